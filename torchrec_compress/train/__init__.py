"""Training: data, models, the loop, checkpoints, stages, comparison and report."""
