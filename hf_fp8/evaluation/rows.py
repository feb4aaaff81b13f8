"""The rows of `quality`, one for each layer: a table, statistics, and which rows stand out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

# A layer stands out if its SQNR lies more than this many median absolute deviations below the median of all layers. The few
# layers that stand out do not change the median and its deviation, as they would change a mean and a standard deviation; 3
# are about 2 standard deviations of a normal distribution.
OUTLYING_DEVIATIONS = 3.0
# And at least this many dB below it. 3 dB is twice the noise power; layers of one shape differ by tenths of a dB, where three
# deviations have no meaning in practice.
OUTLYING_DB = 3.0


@dataclass(frozen=True)
class Row:
    """One layer, one projection of an experts module, or an experts module as a whole (outputs only).

    SQNRs are in dB, 20 log10(||x|| / ||x - x_hat||), larger is better: inf if nothing differs, -inf if the float
    values are all zero and the quantized ones are not, None if there is nothing to compare.

    module: the name to put on an `ignore` list; that of the experts module for a projection. shape: of the weight.
    relative_error: ||w - w_hat|| / ||w||. largest_error: max |w - w_hat|. worst_expert, worst_expert_sqnr: of a
    projection, the expert whose weight has the lowest SQNR. output_sqnr: the layer alone, given the float model's
    inputs. accumulated_sqnr: the layer in the quantized model against the layer in the float model. note: what could
    not be compared, and why.
    """

    name: str
    module: str
    scheme: str
    shape: tuple[int, ...] = ()
    weight_sqnr: float | None = None
    relative_error: float | None = None
    largest_error: float | None = None
    worst_expert: int | None = None
    worst_expert_sqnr: float | None = None
    output_sqnr: float | None = None
    accumulated_sqnr: float | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """The last part of the name: q_proj, down_proj, ..."""
        return self.name.rpartition(".")[2]

    def as_json(self) -> dict[str, Any]:
        """Fields by name, in strict JSON: see `finite`."""
        return finite({field.name: getattr(self, field.name) for field in fields(self)})


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with null for inf, -inf and nan, which JSON does not have; they are named under "not_finite"."""
    strange = {key: str(v) for key, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    kept = {key: None if key in strange else list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    return {**kept, "not_finite": strange} if strange else kept


class Rows(list[Row]):
    """Rows as a list; prints as a table."""

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    def values(self, measure: str) -> list[float]:
        """The values of a field, without None."""
        return [value for row in self if (value := getattr(row, measure)) is not None]

    def table(self, footer: bool = False) -> str:
        """One line for each row, with the columns that any row has; with `footer`, also median and minimum of each SQNR."""
        if not self:
            return "no layers"
        columns = [
            (title, measure, digits)
            for title, measure, digits in (
                ("weight dB", "weight_sqnr", ".2f"),
                ("rel. error", "relative_error", ".4f"),
                ("max error", "largest_error", ".2e"),
                ("output dB", "output_sqnr", ".2f"),
                ("in model dB", "accumulated_sqnr", ".2f"),
            )
            if self.values(measure)
        ]
        several = len({row.scheme for row in self}) > 1
        lines = [["layer", *(["scheme"] if several else []), *(title for title, _, _ in columns), "note"]]
        for row in self:
            numbers = [shown(getattr(row, measure), digits) for _, measure, digits in columns]
            note = row.note
            if row.worst_expert is not None:
                note = f"worst expert {row.worst_expert}: {shown(row.worst_expert_sqnr)} dB" + (f"; {note}" if note else "")
            lines.append([row.name, *([row.scheme] if several else []), *numbers, note])
        if footer:
            for title, statistic in (("median", median), ("minimum", minimum)):
                found = [statistic(self.values(m)) if m.endswith("sqnr") else None for _, m, _ in columns]
                cells = ["" if value is None else shown(value) for value in found]
                lines.append([title, *([""] if several else []), *cells, ""])
        words = {0, len(lines[0]) - 1, *([1] if several else [])}
        return aligned(lines, left=words)

    def worst(self, n: int) -> Rows:
        """The n rows with the lowest `output_sqnr` (or `weight_sqnr` if they have none), NaN first."""
        rated = [(row.weight_sqnr if row.output_sqnr is None else row.output_sqnr, row) for row in self]
        known = [(value, row) for value, row in rated if value is not None]
        return Rows(row for _, row in sorted(known, key=lambda pair: rank(pair[0]))[:n])

    def standing_out(self) -> Rows:
        """The rows that stand out (`OUTLYING_DEVIATIONS`, `OUTLYING_DB`) by their outputs or by their weights.

        Rows with an SQNR of NaN or -inf always do.
        """
        # Outputs of experts have passed two layers and a gate: they are compared only with other experts.
        wholes = Rows(row for row in self if not row.shape)
        layers = Rows(row for row in self if row.shape)
        groups = (layers.outlying("weight_sqnr"), layers.outlying("output_sqnr"), wholes.outlying("output_sqnr"))
        names = {name for group in groups for name in group}
        return Rows(row for row in self if row.name in names)

    def outlying(self, measure: str) -> list[str]:
        """Names of the rows that stand out by one measure among all rows here."""
        numbers = [value for value in self.values(measure) if math.isfinite(value)]
        limit = -math.inf
        if numbers:
            middle = statistics.median(numbers)
            deviation = statistics.median(abs(value - middle) for value in numbers)
            limit = middle - max(OUTLYING_DEVIATIONS * deviation, OUTLYING_DB)
        rated = [(row.name, getattr(row, measure)) for row in self]
        return [name for name, v in rated if v is not None and (math.isnan(v) or v == -math.inf or v < limit)]


def rank(value: float) -> float:
    """A sort key that puts NaN first, as the worst."""
    return -math.inf if math.isnan(value) else value


def median(values: Iterable[float]) -> float | None:
    """The median of finite values; inf if there is only inf, None if there are no values."""
    given = [value for value in values if not math.isnan(value) and value != -math.inf]
    numbers = [value for value in given if math.isfinite(value)]
    return statistics.median(numbers) if numbers else math.inf if given else None


def minimum(values: Iterable[float]) -> float | None:
    """The smallest value, NaN if there is one; None if there are no values."""
    return min(values, key=rank, default=None)


def shown(value: float | None, digits: str = ".2f") -> str:
    """A number in a table: `-` for None, `exact` for inf."""
    if value is None:
        return "-"
    return {"inf": "exact", "nan": "NaN"}.get(str(value)) or format(value, digits)


def aligned(lines: Sequence[Sequence[str]], left: Container[int]) -> str:
    """A table of cells. left: numbers of the columns that are aligned to the left, the others are to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
