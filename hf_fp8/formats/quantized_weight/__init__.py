"""QuantizedWeight: a parameter that stores codes (8-bit values) and is used in computations as the dequantized weight."""
