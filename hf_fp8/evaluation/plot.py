"""Draws SQNR against depth: one panel for weights, one for outputs, one colour and marker for each kind of layer."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

from .rows import Row, Rows

# Number of blocks between vertical lines.
GRID = 5
MARKERS = "osD^vPX<>*hp"
RING: dict[str, Any] = {"marker": "o", "markersize": 9, "fillstyle": "none", "color": "black", "linewidth": 0}
PANELS = (
    ("weight_sqnr", "weights"),
    ("output_sqnr", "outputs, each layer alone"),
    ("accumulated_sqnr", "outputs, in the quantized model"),
)


def depths(rows: Rows) -> tuple[dict[str, int], dict[int, str]]:
    """(name of a row -> its place on the axis, place -> label).

    A place is a block, the part of a name up to its first number (`model.layers.3`); a layer outside of blocks is a place, too.
    """
    places: dict[str, int] = {}
    found: dict[str, int] = {}
    labels: dict[int, str] = {}
    for row in rows:
        parts = row.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = row.name if number is None else ".".join(parts[: number + 1])
        found[row.name] = places.setdefault(key, len(places))
        labels.setdefault(found[row.name], row.kind if number is None else parts[number])
    return found, labels


def draw(rows: Rows, title: str, path: Path) -> Path:
    """Draw `rows` to `path`, .svg or .png. Raises ImportError without matplotlib, ValueError if there is nothing to draw."""
    try:
        matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("drawing the report needs matplotlib: pip install matplotlib") from error
    panels = [(measure, name) for measure, name in PANELS if rows.values(measure)]
    if not panels:
        raise ValueError("no row has a number to draw")
    kinds = list(dict.fromkeys(row.kind for row in rows))
    places, labels = depths(rows)
    with matplotlib.rc_context({"svg.hashsalt": "hf_fp8"}):  # the same rows give the same file
        width = min(max(6.5, 2.5 + 0.16 * len(labels)), 14)
        figure = figures.Figure(figsize=(width, 0.9 + 2.3 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        outlying = {row.name for row in rows.standing_out()}
        for axis, (measure, name) in zip(axes, panels, strict=True):
            _panel(axis, rows, measure, kinds, places, outlying.intersection(rows.outlying(measure)))
            axis.set_title(name, fontsize=9, loc="left")
            axis.set_ylabel("SQNR, dB", fontsize=8)
            axis.tick_params(labelsize=8)
        _label(axes[-1], labels)
        handles, names = axes[0].get_legend_handles_labels()
        for axis in axes[1:]:  # a kind may be in one panel only
            more = [(h, n) for h, n in zip(*axis.get_legend_handles_labels(), strict=True) if n not in names]
            handles, names = handles + [h for h, _ in more], names + [n for _, n in more]
        if outlying:
            handles.append(axes[0].plot([], [], **RING)[0])
            names.append("stands out")
        figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False)
        wrapped = [textwrap.fill(line, int(11 * width)) for line in title.splitlines()]
        figure.suptitle("\n".join(wrapped), fontsize=10)
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


def _panel(axis: Any, rows: Rows, measure: str, kinds: list[str], places: dict[str, int], outlying: set[str]) -> None:
    """Draw one measure of all rows. Infinite values and NaN are drawn at the upper or lower edge."""
    colours = [f"C{number}" for number in range(10)]
    values = [value for value in rows.values(measure) if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max(0.08 * (high - low), 0.25)
    axis.set_ylim(low - room, high + room)
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if getattr(row, measure) is not None:
            by_kind[row.kind].append(row)
    for number, kind in enumerate(kinds):
        points = [(places[row.name], getattr(row, measure), row) for row in by_kind[kind]]
        if not points:
            continue
        colour, marker = colours[number % len(colours)], MARKERS[number % len(MARKERS)]
        finite = [(x, y) for x, y, _ in points if math.isfinite(y)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "label": kind}
        # Several layers of a kind in a block, such as single experts, are points without a line.
        line = "-" if len({x for x, _ in finite}) == len(finite) else ""
        axis.plot(*(zip(*finite, strict=True) if finite else ([], [])), linestyle=line, linewidth=0.7, **style)
        for x, y, row in points:
            if not math.isfinite(y):
                exact = y == math.inf
                at = 0.98 if exact else 0.02
                transform = axis.get_xaxis_transform()  # x in data, y in parts of the panel
                axis.plot([x], [at], color=colour, marker=marker, markersize=5, fillstyle="none", transform=transform)
                if not exact:
                    axis.text(x, 0.07, str(y), transform=transform, fontsize=6, color="red", ha="center")
            elif row.name in outlying:
                axis.plot([x], [y], **RING)
    if any(value == math.inf for value in rows.values(measure)):
        axis.set_title("hollow, at the top: exact", fontsize=7, loc="right")


def _label(axis: Any, labels: dict[int, str]) -> None:
    """Label every GRID-th block with its number and a line through all panels, and layers outside of blocks with names."""
    blocks = [place for place, label in labels.items() if label.isdigit() and int(label) % GRID == 0]
    others = [place for place, label in labels.items() if not label.isdigit()]
    others = others if len(others) <= 12 else []
    for place in blocks:
        for each in axis.figure.axes:
            each.axvline(place, color="0.85", linewidth=0.7, zorder=0)
    ticks = sorted(blocks + others)
    axis.set_xticks(ticks, [labels[place] for place in ticks])
    for tick, place in zip(axis.get_xticklabels(), ticks, strict=True):
        if not labels[place].isdigit():
            tick.set(rotation=30, ha="right")
    axis.set_xlim(-0.6, max(labels) + 0.6)
    axis.set_xlabel("block" if blocks else "layer", fontsize=8)
