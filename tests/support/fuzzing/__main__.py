"""Fuzzes loading, `scripts/fuzz`: each mutated FP8 checkpoint ends in right numbers or in an error of hf_fp8's own tree.

Cases are numbered: `--seed 5000 --count 1000` runs 5000 to 5999, and `--case 5017` is one of them by itself. Exit code 1 if any
failed. How it is judged: tests/support/fuzzing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from .cases import Case
from .drafts import deep_json
from .judging import FAILURES, GOOD, NOT_JUDGED, Outcome
from .workers import quiet, run


def replay(seed: int, keep: Path | None) -> int:
    case = Case.of(seed)
    assert case.draft is not None
    print(f"case {seed}: {case.base}, mode {case.mode}, {case.dtype}")
    for change in case.changes:
        print(f"  {change.text}{' (harmless)' if change.harmless else ''}")
    print(deep_json(case.draft.config)[:6000])
    if keep is not None:
        case.write(keep)
    (outcome,) = run([seed], 1)
    print(f"{outcome.trace}\n{outcome.kind}: {outcome.detail}")
    return int(outcome.failed)


def table(outcomes: list[Outcome], seconds: float) -> str:
    lines = [f"{len(outcomes)} cases, {seconds:.0f} s", ""]
    for kind in (*GOOD, *FAILURES):
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        if not mine:
            continue
        lines.append(f"{len(mine):6}  {100 * len(mine) / len(outcomes):5.1f}%  {kind.upper() if kind in FAILURES else kind}")
        counts = Counter(outcome.detail for outcome in mine if outcome.detail)
        shown = counts.most_common(None if kind in FAILURES else 12)
        for detail, count in shown:
            seeds = [str(outcome.seed) for outcome in mine if outcome.detail == detail][:4]
            lines.append(f"{count:14}  {detail[:150]}" + (f"  [{', '.join(seeds)}]" if kind in (*FAILURES, NOT_JUDGED) else ""))
        if len(counts) > len(shown):
            lines.append(f"{sum(counts.values()) - sum(n for _, n in shown):14}  others")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--case", type=int, help="replay one case: its mutations, its config, the traceback")
    parser.add_argument("--keep", type=Path, help="with --case: write its files to this folder")
    parser.add_argument("--json", type=Path, help="write all outcomes to this file")
    return parser


def main() -> None:
    options = arguments().parse_args()
    quiet()
    if options.case is not None:
        sys.exit(replay(options.case, options.keep))
    start = time.monotonic()
    outcomes = []
    for outcome in run(range(options.seed, options.seed + options.count), options.jobs):
        outcomes.append(outcome)
        if outcome.failed:
            print(f"{outcome.seed}: {outcome.kind}: {outcome.detail[:200]}\n    {outcome.case[:300]}", flush=True)
            print(f"    {outcome.message[:200]!r}" if outcome.message else "", flush=True)
        elif len(outcomes) % 100 == 0:
            print(f"{len(outcomes)} of {options.count}", file=sys.stderr, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    print("\n" + table(sorted(outcomes, key=lambda outcome: outcome.seed), time.monotonic() - start))
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
