"""Support for PEFT's adapters on quantized layers."""
