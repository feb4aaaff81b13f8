"""Quantized modules (FP8 or int8 codes plus scales) and their custom ops. Codes are the stored 8-bit numbers."""
