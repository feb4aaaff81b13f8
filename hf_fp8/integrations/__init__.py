"""Integration with transformers, PEFT, DDP and other libraries."""
