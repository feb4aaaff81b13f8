"""Reads, checks and writes checkpoint files and their `quantization_config`, without importing transformers."""
