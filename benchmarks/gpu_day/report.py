"""What the steps of the day wrote, as text: read from their CSV files."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

Row = dict[str, str]


def geometric(values: list[str]) -> str:
    numbers = [float(value) for value in values if value]
    return f"{statistics.geometric_mean(numbers):.2f}" if numbers else "-"


def linears(rows: list[Row]) -> Iterator[str]:
    ms = sorted({int(row["m"]) for row in rows})
    for scheme in ("channel", "block"):
        yield f"\n{scheme}, x dense of all shapes, eager / in a graph\n{'M':<28}" + "".join(f"{m:>12}" for m in ms)
        for name in dict.fromkeys(row["contender"] for row in rows if row["scheme"] == scheme):
            mine = [row for row in rows if row["scheme"] == scheme and row["contender"] == name]
            cells = []
            for m in ms:
                at = [row for row in mine if int(row["m"]) == m]
                cells.append(f"{geometric([row['eager_x'] for row in at])}/{geometric([row['graph_x'] for row in at])}")
            yield f"{name[:27]:<28}" + "".join(f"{cell:>12}" for cell in cells)
    for error in list(dict.fromkeys(f"{row['contender']}: {row['error']}" for row in rows if row["error"]))[:6]:
        yield f"not measured: {error[:140]}"


def experts(rows: list[Row]) -> Iterator[str]:
    cells: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["contender"] not in ("grouped_dequantize", "grouped_weight_only"):  # references
            cell = f"{row['contender'].removeprefix('triton_grouped_')} x{float(row['ratio_to_dense']):.2f}"
            cells[f"{row['case']} {row['scheme']} T={row['m']}"].append(cell)
    for case, found in cells.items():
        yield f"{case}: {', '.join(found)}"


def sweep(rows: list[Row]) -> Iterator[str]:
    best: dict[tuple[str, ...], list[tuple[float, str]]] = defaultdict(list)
    for row in rows:
        if row["us"]:
            best[row["kernel"], row["scheme"], row["m"], row["n"], row["k"]].append((float(row["us"]), row["tile"]))
    for case, found in best.items():
        yield f"{' '.join(case)} -> {', '.join(f'{tile} {us:.1f} us' for us, tile in sorted(found)[:2])}"


def each(line: Callable[[Row], str]) -> Callable[[list[Row]], Iterator[str]]:
    return lambda rows: map(line, rows)


LINES: dict[str, Callable[[list[Row]], Iterator[str]]] = {
    "ceilings": each(lambda row: f"{row['what']}: {row['value']}"),
    "linears": linears,
    "experts": experts,
    "model": each(lambda r: f"{r['contender']}, {r['what']}: {r['ms']} ms, x{r['x']}, peak {r['gb']} GB {r['error']}"),
    "training": each(lambda r: f"{r['case']} {r['contender']}: {r['ms']} ms, x{r['ratio_to_dense']}, {r['gb']} GB"),
    "sweep": sweep,
}


def report(out: Path, took: dict[str, str]) -> None:
    """Print all steps in `took`, the most important last: of long outputs the end is what people see."""
    for name, how in reversed(took.items()):
        print(f"\n== {name}: {how}")
        path = out / ("tests.log" if name == "tests" else f"{name}.csv")
        if not path.exists():
            print("nothing")
        elif name == "tests":
            print("\n".join(path.read_text().splitlines()[-12:])[-1000:])
        else:
            with path.open() as file:
                print("\n".join(LINES[name](list(csv.DictReader(file)))))
