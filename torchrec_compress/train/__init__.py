"""Training: data, models, the loop, checkpoints, comparisons."""
