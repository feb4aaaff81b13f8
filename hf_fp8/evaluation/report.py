"""The report of `quality`: a table with a footer, JSON, and a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plot import draw
from .rows import OUTLYING_DB, OUTLYING_DEVIATIONS, Rows, finite, median, minimum, shown


@dataclass(repr=False)
class QualityReport:
    """The result of `quality`; prints as a table of all rows with median, minimum, and the layers that stand out.

    rows: in the order of the model. logits_sqnr: of the models' logits (or first output), dB. kl_divergence: of the
    quantized model's next-token distribution from the float one's, nats, the mean over `tokens`. perplexity: (before,
    after); before is None if there was no reference. Values that were not measured are None.
    """

    rows: Rows
    logits_sqnr: float | None = None
    kl_divergence: float | None = None
    tokens: int = 0
    perplexity: tuple[float | None, float] | None = None

    def __str__(self) -> str:
        return f"{self.rows.table(footer=True)}\n{self.footer()}"

    __repr__ = __str__

    def worst(self, n: int = 10) -> Rows:
        """The n worst rows by `output_sqnr`, else `weight_sqnr`; prints as a table."""
        return self.rows.worst(n)

    @property
    def schemes(self) -> list[str]:
        """Descriptions of the schemes, each once."""
        return list(dict.fromkeys(row.scheme for row in self.rows if row.shape))

    @property
    def ignore(self) -> list[str]:
        """Names of the modules that stand out, for the `ignore` option that leaves them in float."""
        return list(dict.fromkeys(row.module for row in self.rows.standing_out()))

    def footer(self) -> str:
        """Text with medians and minima, end-to-end measures, and the layers that stand out."""
        lines = [f"scheme: {'; '.join(self.schemes)}"]
        names = {"weight_sqnr": "weights", "output_sqnr": "outputs, layer alone", "accumulated_sqnr": "outputs, in the model"}
        for measure, name in names.items():
            values = self.rows.values(measure)
            if values:
                of_all = f"median {shown(median(values))} dB, minimum {shown(minimum(values))} dB"
                lines.append(f"{name}: {of_all} ({len(values)} layers)")
        if self.logits_sqnr is not None:
            kl = "" if self.kl_divergence is None else f", KL divergence {self.kl_divergence:.2e} nats"
            lines.append(f"logits: {shown(self.logits_sqnr)} dB{kl}{f' ({self.tokens:,} tokens)' if self.tokens else ''}")
        if self.perplexity is not None:
            lines.append(f"perplexity: {self.perplexity_text()}")
        lines.append(self.sentence())
        return "\n".join(lines)

    def perplexity_text(self) -> str:
        """`14.21 -> 14.40 (+1.3%)`."""
        assert self.perplexity is not None
        before, after = self.perplexity
        return f"{after:.3f}" if before is None else f"{before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.2f}%)"

    def sentence(self) -> str:
        """Which layers stand out, and how to leave them in float."""
        rule = (
            f"more than {OUTLYING_DEVIATIONS:g} median absolute deviations and {OUTLYING_DB:g} dB below the median, by "
            "outputs or weights"
        )
        names = self.ignore
        if not names:
            return f"No layer stands out ({rule})."
        verb = "layers stand out" if len(names) > 1 else "layer stands out"
        return (
            f"{len(names)} {verb} ({rule}). To leave {'them' if len(names) > 1 else 'it'} in float: ignore={json.dumps(names)}"
        )

    def as_json(self) -> dict[str, Any]:
        """All numbers in strict JSON: NaN and infinity are null, and named under "not_finite" next to it."""
        before, after = self.perplexity or (None, None)
        ends = {
            "logits_sqnr": self.logits_sqnr, "kl_divergence": self.kl_divergence, "tokens": self.tokens,
            "perplexity_before": before, "perplexity_after": after,
        }  # fmt: skip
        measures = ("weight_sqnr", "output_sqnr", "accumulated_sqnr")
        statistics = {
            m: finite({"median": median(self.rows.values(m)), "minimum": minimum(self.rows.values(m))}) for m in measures
        }
        rows = [row.as_json() for row in self.rows]
        return {"schemes": self.schemes, **finite(ends), "statistics": statistics, "ignore": self.ignore, "rows": rows}

    def to_json(self, path: Path | str | None = None) -> str:
        """`as_json` as text; also written to `path` if it is given."""
        text = json.dumps(self.as_json(), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def plot(self, path: Path | str, title: str | None = None) -> Path:
        """Draw SQNR against depth, as .svg or .png by the suffix of `path`; returns the path.

        title: by default schemes and perplexity. Raises ImportError without matplotlib.
        """
        if title is None:
            title = "; ".join(self.schemes)
            title += f"\nperplexity {self.perplexity_text()}" if self.perplexity is not None else ""
        return draw(self.rows, title, Path(path))
