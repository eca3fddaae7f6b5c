"""Launch the training of a compressed DLRM with TorchX."""
