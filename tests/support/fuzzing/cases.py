"""A case: a seed, and the checkpoint and the options of loading that come of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from hf_fp8 import FP8Config

from .bases import BASES, base
from .config_faults import CONFIG, Fault
from .drafts import Change, Draft
from .file_faults import FILES
from .model_faults import MODEL
from .tensor_faults import TENSORS

# Kinds of mutations, and how often each is taken.
KINDS: list[tuple[dict[Fault, float], float]] = [(CONFIG, 0.33), (TENSORS, 0.37), (MODEL, 0.1), (FILES, 0.2)]
MODES: dict[str, dict[str, Any] | None] = {
    "default": None, "dequantize": {"dequantize": True}, "weight_only": {"backend": "weight_only"},
    # The judge does not know how inputs of experts are rounded.
    "scaled_mm": {"backend": "scaled_mm", "experts": "dequantize"},
    "int8": {"backend": "int8"}, "experts": {"experts": "fp8"},
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """mode: how it is loaded, of MODES. dtype: of DTYPES."""

    seed: int
    base: str
    mode: str
    dtype: str
    changes: list[Change] = field(default_factory=list)
    draft: Draft | None = None

    @staticmethod
    def of(seed: int) -> Case:
        rng = Random(seed)
        name = rng.choice(list(BASES))
        case = Case(seed, name, rng.choice(list(MODES)), rng.choice(list(DTYPES)), draft=Draft.of(base(name)))
        assert case.draft is not None
        wanted = rng.choice([1, 1, 1, 2, 3])
        for _ in range(100):
            if len(case.changes) == wanted:
                break
            faults = rng.choices([faults for faults, _ in KINDS], [share for _, share in KINDS])[0]
            try:
                change = rng.choices(list(faults), list(faults.values()))[0](case.draft, rng)
            except (RecursionError, LookupError):  # another mutation has nested deeply, or dropped, what this one wanted
                continue
            if change is not None:
                case.changes.append(change)
        return case

    @property
    def harmless(self) -> bool:
        return all(change.harmless for change in self.changes)

    @property
    def options(self) -> dict[str, Any]:
        given = MODES[self.mode]
        return {} if given is None else {"quantization_config": FP8Config(**given)}

    def write(self, folder: Path) -> None:
        assert self.draft is not None
        self.draft.write(folder)

    def __str__(self) -> str:
        changes = "; ".join(change.text for change in self.changes) or "nothing changed"
        return f"{self.base}, {self.mode}, {self.dtype}: {changes}"
