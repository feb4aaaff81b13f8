"""Other ways than compressed-tensors to describe FP8 checkpoints: one module for each, and `registry`."""
