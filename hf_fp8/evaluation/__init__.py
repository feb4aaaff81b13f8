"""What quantizing cost: layers, outputs and perplexity of a quantized model against those of the float one."""

from .compare import quality
from .report import QualityReport
from .rows import Row, Rows
from .running import perplexity

__all__ = ["QualityReport", "Row", "Rows", "perplexity", "quality"]
