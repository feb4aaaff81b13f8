"""What PEFT is taught about layers that hold codes."""
