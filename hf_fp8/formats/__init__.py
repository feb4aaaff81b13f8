"""Quantization schemes, codes (stored 8-bit values), scales, and the reference arithmetic."""
