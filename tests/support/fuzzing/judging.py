"""Holds what loading made of a mutated checkpoint against what its files mean."""

from __future__ import annotations

import gc
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from support.build import State, error, stock_transformers
from transformers import AutoConfig, CompressedTensorsConfig

from .bases import base
from .cases import DTYPES, Case
from .drafts import Draft
from .meaning import Meaning, decode, lenient
from .says import Contradiction, Inputs, NotFP8, Unclear
from .twin import Hang, Result, Twin, attempt, limited, load_ours, without_quantization

# Good ends, and those that nothing can be said of; every other one is a failure.
RIGHT, OUR_ERROR, HOSTS_ERROR, LEFT, NOT_JUDGED = "right numbers", "our error", "host's own", "left to the host", "not judged"
GOOD = (RIGHT, OUR_ERROR, HOSTS_ERROR, LEFT, NOT_JUDGED)
WRONG, ACCEPTED, REFUSED = "wrong numbers", "accepted a contradiction", "refused a good checkpoint"
FOREIGN, HANGS, MEMORY, DIED = "foreign exception", "hang", "memory", "the process died"
FAULT = "fault of the fuzzer itself"
FAILURES = (WRONG, ACCEPTED, HANGS, MEMORY, DIED, FOREIGN, REFUSED, FAULT)

SECONDS = 10.0
DECODING = 3.0
LIMITS = {"float32": 2e-5, "bfloat16": 2e-2}
INT8_LIMIT = 6e-2  # the twin imitates neither the rounding of inputs nor the columns that are left out of it
NOISE = {"float32": 1e-6, "bfloat16": 4e-3}


@dataclass(frozen=True)
class Outcome:
    """How a case ended. kind: of GOOD or FAILURES. detail: which error, or what is wrong."""

    seed: int
    kind: str
    detail: str
    case: str
    message: str = ""
    trace: str = ""

    @property
    def failed(self) -> bool:
        return self.kind not in GOOD


def run_case(case: Case, phase: Callable[[str], None] = lambda name: None, seconds: float = SECONDS) -> Outcome:
    """phase: told before each part: "ours", which is what is limited, and "judging"."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mutated"
        case.write(folder)
        phase("ours")
        ours = attempt(lambda: load_ours(folder, DTYPES[case.dtype], case.options), seconds)
        phase("judging")
        try:
            with limited(3 * seconds):
                kind, detail = Judge(case, folder, Path(name), seconds).judge(ours)
        except Hang:
            kind, detail = NOT_JUDGED, "the oracle took too long"
        except Exception as error:
            kind, detail = FAULT, repr(error)[:200]
            ours = replace(ours, trace=ours.trace + traceback.format_exc())
        shutil.rmtree(folder, ignore_errors=True)
    gc.collect(0)
    return Outcome(case.seed, kind, detail, str(case), ours.message, ours.trace)


@cache
def base_state(name: str) -> State:
    """What a base means, before any mutation."""
    with tempfile.TemporaryDirectory() as folder:
        Draft.of(base(name)).write(Path(folder))
        return decode(Path(folder)).state


def same_state(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].double(), other[name].double()) for name in one)


def host_hangs(case: Case, seconds: float = SECONDS) -> bool:
    """Whether transformers by itself does not get done with a checkpoint, without its quantization."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mutated"
        case.write(folder)
        return Judge(case, folder, Path(name), seconds).of_the_host(Result(raised="Hang")) != ""


class Judge:
    def __init__(self, case: Case, folder: Path, work: Path, seconds: float) -> None:
        self.case, self.folder, self.work, self.seconds = case, folder, work, seconds
        self.dtype = DTYPES[case.dtype]
        self.twins = 0

    def judge(self, ours: Result) -> tuple[str, str]:
        if ours.is_ours:
            return (REFUSED, ours.raised) if self.case.harmless else (OUR_ERROR, ours.raised)
        try:
            with limited(DECODING):
                meaning: Meaning | Exception = decode(self.folder)
        except (Contradiction, NotFP8, Unclear) as reason:
            meaning = reason
        except Hang:
            meaning = Unclear("an expression that takes too long")
        if ours.raised:
            return self._judge_error(ours, meaning)
        if isinstance(meaning, Meaning):
            return self._compare(ours, meaning)
        if isinstance(meaning, NotFP8):
            return (LEFT, "the same numbers") if self._as_stock(ours) else (NOT_JUDGED, f"not FP8: {meaning}")
        if isinstance(meaning, Contradiction):
            return ACCEPTED, str(meaning)
        return NOT_JUDGED, str(meaning)

    def _judge_error(self, ours: Result, meaning: Meaning | Exception) -> tuple[str, str]:
        if isinstance(meaning, NotFP8) and self._as_stock(ours):
            return LEFT, f"the same {ours.raised}"
        where = self.of_the_host(ours)
        if where:
            return HOSTS_ERROR, where
        return (HANGS, ours.place) if ours.raised == "Hang" else (FOREIGN, f"{ours.raised} in {ours.place}")

    def of_the_host(self, ours: Result) -> str:
        """Where transformers raises the same without us, "" if it does not.

        "config": without the quantization, and with dense weights; "files": with the files as they are; "reading config.json":
        before anything is known of a quantization.
        """
        try:
            dense = self._twin(lenient(self.folder))
        except Contradiction:
            dense = None
        loads: list[tuple[str, Callable[[], Result]]] = [("reading config.json", self._read_config)]
        loads += [] if dense is None else [("config", dense.load)]
        for where, load in [*loads, ("files", self._twin(None).load)]:
            found = attempt(load, self.seconds)
            if found.same_error(ours) or (found.raised == ours.raised == "Hang"):
                return f"{where}: {ours.raised} in {found.place}"
        return ""

    def _read_config(self) -> Result:
        with stock_transformers():
            AutoConfig.from_pretrained(self.folder)
        return Result()

    def _twin(self, state: dict[str, torch.Tensor] | None) -> Twin:
        self.twins += 1
        folder = self.work / f"twin{self.twins}"
        without_quantization(self.folder, folder, state)
        return Twin(folder, self.dtype)

    def _as_stock(self, ours: Result) -> bool:
        """Whether transformers makes the same of the folder when we are not there."""
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if self.case.mode == "dequantize" else {}
        with stock_transformers():
            theirs = attempt(lambda: load_ours(self.folder, self.dtype, options), self.seconds)
        if theirs.logits is None or ours.logits is None:
            return theirs.same_error(ours)
        return torch.equal(theirs.logits.nan_to_num(), ours.logits.nan_to_num())

    def _compare(self, ours: Result, meaning: Meaning) -> tuple[str, str]:
        mode = self.case.mode
        if self.case.harmless and not same_state(meaning.state, base_state(self.case.base)):
            return FAULT, "what is called harmless changes what the decoder reads"
        if mode == "scaled_mm":
            for name in ours.kept:
                wrong = next(
                    filter(None, (meaning.unfit.get(s) for s in (name, name.removeprefix("model."), f"model.{name}"))), ""
                )
                if wrong:
                    return ACCEPTED, wrong
        twin = replace(self._twin(meaning.state), state=meaning.state, inputs=meaning.inputs)
        wanted = attempt(lambda: twin.load(ours.kept, mode), self.seconds)
        if wanted.raised:
            return ACCEPTED, f"transformers refuses its dense twin: {wanted.raised} in {wanted.place}"
        if wanted.missing:
            return ACCEPTED, f"nothing fills {sorted(wanted.missing)[0]}" + f" and {len(wanted.missing) - 1} more" * (
                len(wanted.missing) > 1
            )
        assert wanted.logits is not None and ours.logits is not None
        if wanted.logits.shape != ours.logits.shape:
            return WRONG, f"logits of shape {list(ours.logits.shape)}, not {list(wanted.logits.shape)}"
        seen, there = ~ours.logits.isfinite(), ~wanted.logits.isfinite()
        if there.any() or seen.any():
            return self._compare_nans(seen, there, meaning)
        found = self._off(ours.logits, wanted.logits)
        limit = max(LIMITS[self.case.dtype], INT8_LIMIT if mode == "int8" else 0.0)
        if self.case.base == "mixed-int4":
            limit = max(limit, 1e-2)  # the int4 part is the host's arithmetic
        if mode == "scaled_mm" and found > limit:
            # Kernels multiply codes; without one for a scheme, weights are multiplied out to the model's dtype before.
            other = attempt(lambda: twin.load(ours.kept, "scaled_mm, multiplied out"), self.seconds)
            found = min(found, self._off(ours.logits, other.logits)) if other.logits is not None else found
        if found <= limit:
            return RIGHT, ""
        # How far the logits move if every weight is off by as much as rounding may be off.
        noise = max(NOISE[self.case.dtype], 1e-2 if mode == "int8" else 0.0)
        moved = attempt(lambda: twin.load(ours.kept, mode, noise), self.seconds)
        floor = self._off(moved.logits, wanted.logits) if moved.logits is not None else 1.0
        if found <= 6 * floor:
            return (RIGHT, "") if 6 * floor < 0.3 else (NOT_JUDGED, "small changes move the logits far")
        if mode == "scaled_mm" and any(kind == Inputs("?") for kind, _ in meaning.inputs.values()):
            return NOT_JUDGED, "inputs of a malformed config"
        return WRONG, f"off by {found:.1e}, where {max(limit, 6 * floor):.1e} is allowed"

    def _off(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        """The error of all logits. Where rounding decides something (codes of inputs, a token's experts), that of some tokens:
        a wrong weight is wrong for all of them, one that was rounded the other way for those that come after it."""
        if torch.equal(found, wanted):
            return 0.0  # also where all are zero
        mode = self.case.mode
        if self.case.dtype == "float32" and mode not in ("scaled_mm", "int8"):
            return error(found, wanted)
        pairs = zip(found.flatten(0, -2), wanted.flatten(0, -2), strict=True)
        rows = sorted(0.0 if torch.equal(row, of) else error(row, of) for row, of in pairs)
        return rows[len(rows) // (4 if mode == "scaled_mm" else 2)]

    def _compare_nans(self, seen: torch.Tensor, there: torch.Tensor, meaning: Meaning) -> tuple[str, str]:
        if seen.any() and there.any():
            return RIGHT, ""
        if any(not tensor.isfinite().all() for tensor in meaning.state.values() if tensor.is_floating_point()):
            return (WRONG, "a NaN of the files is not to be seen") if not seen.any() else (RIGHT, "")
        largest = max(
            tensor.abs().amax().item() for tensor in meaning.state.values() if tensor.is_floating_point() and tensor.numel()
        )
        if largest > 1e9:
            return NOT_JUDGED, "an overflow, in the one or in the other"
        return WRONG, "NaN where there should be numbers" if seen.any() else "numbers where there should be NaN"
