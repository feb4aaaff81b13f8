"""QuantizedWeight: a parameter of codes that computes as the weight that it stands for."""
