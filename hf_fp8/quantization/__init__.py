"""Making FP8 models and checkpoints."""
