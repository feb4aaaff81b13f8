"""Compares a quantized model with the float one: weights and outputs of layers, logits, perplexity."""

from .compare import quality
from .report import QualityReport
from .rows import Row, Rows
from .running import perplexity

__all__ = ["QualityReport", "Row", "Rows", "perplexity", "quality"]
