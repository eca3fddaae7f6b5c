"""One stage of training: the wrapped model, its steps, its checkpoints."""
