"""What transformers, PEFT, DDP and other libraries call."""
