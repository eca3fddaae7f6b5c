"""A plan of tables by their sizes alone, before there is a model, data or a GPU."""
