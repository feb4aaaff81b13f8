"""Loading and running, ours and stock transformers', and what becomes of it: logits or an exception with its place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers
from support.build import State, stock_transformers
from torch import nn
from transformers import AutoModelForCausalLM

import hf_fp8

from .bases import PICKLE, SINGLE
from .drafts import DTYPES, deep_json, header_of, packed
from .says import Inputs

IDS = torch.arange(24).reshape(2, 12)
HOST, OURS = str(Path(transformers.__file__).parent), str(Path(hf_fp8.__file__).parent)


class Hang(BaseException):
    """What was started has not ended in time. Nothing that catches exceptions is meant to catch it."""


@dataclass
class Result:
    """Of loading and running: logits, or what was raised. kept: modules in FP8. missing: parameters that no file filled.

    place: the innermost function of transformers or of hf_fp8 that it went through.
    """

    logits: torch.Tensor | None = None
    kept: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    raised: str = ""
    message: str = ""
    place: str = ""
    is_ours: bool = False
    trace: str = ""

    def same_error(self, other: Result) -> bool:
        return (
            bool(self.raised)
            and (self.raised, self.place) == (other.raised, other.place)
            and not self.place.startswith("hf_fp8")
        )


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang after so many seconds, if the code lets Python's signal handlers run."""

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"not done after {seconds:g} s")

    start = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left = max(outer - (time.monotonic() - start), 0.001) if outer else 0
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def _place(tb: TracebackType | None) -> str:
    place = ""
    for frame in traceback.extract_tb(tb):
        for name, root in (("transformers", HOST), ("hf_fp8", OURS)):
            if frame.filename.startswith(root) and not frame.name.startswith("<"):
                place = f"{name}{frame.filename.removeprefix(root)}:{frame.name}"
    return place


def attempt(work: Callable[[], Result], seconds: float) -> Result:
    """What `work` returns, or a Result of what it raised."""
    try:
        with limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        kind = type(error)
        name = kind.__name__ if kind.__module__ in ("builtins", OURS) else f"{kind.__module__}.{kind.__name__}"
        trace = "".join(traceback.format_exception(kind, error, error.__traceback__, limit=-40))[-8000:]
        ours = isinstance(error, hf_fp8.FP8Error)
        name = kind.__name__ if ours or isinstance(error, Hang) else name
        return Result(
            raised=name, message=str(error)[:500], place=_place(error.__traceback__), is_ours=ours,
            trace=trace.encode(errors="replace").decode(),
        )  # fmt: skip


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits
    return found.float()


def load_ours(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> Result:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    kept = frozenset(name for name, module in model.named_modules() if type(module).__name__ == "QuantizedLinear")
    return Result(run(model), kept)


@dataclass
class Twin:
    """A folder of dense weights that means the same, loaded by stock transformers."""

    folder: Path
    dtype: torch.dtype
    state: State = field(default_factory=dict)
    inputs: dict[str, tuple[Inputs, float]] = field(default_factory=dict)

    def load(self, kept: frozenset[str] = frozenset(), mode: str = "", noise: float = 0.0) -> Result:
        """kept: modules that hold codes, whose inputs `mode` may round. noise: how much each weight is wrong, relatively."""
        with stock_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, output_loading_info=True)
        if noise:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        for name in kept:
            module = model.get_submodule(name)
            if mode.startswith("scaled_mm"):
                spellings = [name, name.removeprefix("model."), f"model.{name}"]
                inputs = next(
                    (self.inputs[spelling] for spelling in spellings if spelling in self.inputs), (Inputs("none"), 0.0)
                )
                weight = next((self.state[f"{s}.weight"] for s in spellings if f"{s}.weight" in self.state), module.weight)
                weight = module.weight if noise else weight
                exact = self.dtype if mode == "scaled_mm, multiplied out" else torch.float32
                module.forward = rounding(*inputs, weight.to(exact), module.bias)
            elif mode == "int8" and isinstance(module, nn.Linear):
                module.weight.data = in_int8(module.weight.data)
        return Result(run(model), missing=frozenset(info["missing_keys"]) - new_heads(model))


def new_heads(model: Any) -> set[str]:
    """The parameters outside the base model, if config.json names another class of transformers: those may be new."""
    written = getattr(model.config, "architectures", None)
    known = (
        [name for name in written if isinstance(name, str) and hasattr(transformers, name)] if isinstance(written, list) else []
    )
    if not known or type(model).__name__ in known:
        return set()
    return {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}


def in_int8(weight: torch.Tensor) -> torch.Tensor:
    """To 8-bit integers per row, and back."""
    scale = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-300) / 127
    return (torch.round(weight.double() / scale) * scale).to(weight.dtype)


def rounding(inputs: Inputs, static: float, weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[Any], Any]:
    """The forward of a Linear that rounds its input to FP8, scale = amax / 448 in float32, and multiplies in weight's dtype."""

    def forward(given: torch.Tensor) -> torch.Tensor:
        x = given.float()
        if inputs.kind == "static":
            x = fp8(x, torch.tensor(static))
        elif inputs.kind == "tensor":
            x = fp8(x, x.abs().amax() / 448)
        elif inputs.kind in ("token", "group"):
            size = inputs.size if inputs.kind == "group" else x.shape[-1]
            x = torch.cat([fp8(piece, piece.abs().amax(-1, keepdim=True) / 448) for piece in x.split(size, -1)], -1)
        out = nn.functional.linear(x.to(weight.dtype), weight)
        return (out if bias is None else out + bias.to(out.dtype)).to(given.dtype)

    return forward


def fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


WEIGHTS = (".safetensors", ".bin", ".index.json")


def without_quantization(source: Path, folder: Path, state: State | None) -> None:
    """A copy of a folder whose config says nothing of quantization. state: its weights, in one file; None: the files as is."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name == "config.json" and path.is_file():
            (folder / path.name).write_bytes(_stripped(path))
        elif state is not None and path.name.endswith(WEIGHTS):
            continue
        elif path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.is_symlink() or path.is_file():
            os.symlink(path.resolve() if path.exists() else path.readlink(), folder / path.name)
        elif path.is_fifo():
            os.mkfifo(folder / path.name)
    if state is not None:
        # A pickle if it was one: transformers reads the two in different functions.
        if any(path.name == PICKLE for path in source.iterdir()):
            torch.save(state, folder / PICKLE)
        else:
            known = {name: tensor for name, tensor in state.items() if tensor.dtype in DTYPES}
            (folder / SINGLE).write_bytes(packed(*header_of(known)))


def _stripped(path: Path) -> bytes:
    raw = path.read_bytes() if path.stat().st_size < 2**28 else b"\0" * 2**20
    try:
        config = json.loads(raw.decode())
    except (ValueError, RecursionError):
        return raw
    if not isinstance(config, dict):
        return raw
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part, dict):
                part.pop(key, None)
    return deep_json(config).encode()
