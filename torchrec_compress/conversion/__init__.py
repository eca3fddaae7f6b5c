"""Checkpoints of dense tables become checkpoints of compressed ones, and back, without a model and block by block."""
