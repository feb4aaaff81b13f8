"""Llama-3-8B's shapes, random weights: prefill, decode (eager, in a CUDA graph, compiled), memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from hf_fp8 import QuantizedLinear, quantize_model

from ..common import shapes
from ..common.timing import first_line
from ..kernels import stock_linear
from ..model import cache_argument
from .machine import Machine, Rows

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}


class Measurements:
    """Of models on a machine. `add` writes rows; x is against the first contender with the same measurement."""

    def __init__(self, rows: Rows, machine: Machine) -> None:
        self.rows, self.machine = rows, machine
        self.base: dict[str, float] = {}
        self.prompt, self.tokens = (4, 8) if machine.dry else (64, 2048)

    def add(self, contender: str, what: str, measure: Callable[[], float]) -> None:
        try:
            taken = measure()
        except Exception as error:
            self.rows.add(contender=contender, what=what, error=first_line(error))
            return
        self.base.setdefault(what, taken)
        peak = 0.0 if self.machine.dry else torch.cuda.max_memory_allocated() / 1e9
        self.rows.add(contender=contender, what=what, ms=taken * 1e3, x=self.base[what] / taken, gb=peak)

    def ids(self, model: Any, count: int) -> torch.Tensor:
        return torch.randint(0, model.config.vocab_size, (1, count), device=self.machine.device)

    def linears_of_a_token(self, model: Any) -> float:
        layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
        sizes = {layer.in_features for layer in layers}
        inputs = {k: torch.randn(1, k, device=self.machine.device, dtype=torch.bfloat16) for k in sizes}
        return self.machine.in_graph(lambda: [layer(inputs[layer.in_features]) for layer in layers])

    def prefill(self, model: Any) -> float:
        given = self.ids(model, self.tokens)
        return self.machine.seconds(lambda: model(given, use_cache=False, logits_to_keep=1), 5)

    def filled(self, model: Any, cache: Any) -> dict[str, Any]:
        """Arguments of a forward: `cache` with a prompt in it."""
        cached = {cache_argument(model): cache, "use_cache": True}
        model(self.ids(model, self.prompt), **cached)
        return cached

    def decode(self, model: Any) -> float:
        cached, token = self.filled(model, DynamicCache(config=model.config)), self.ids(model, 1)
        return self.machine.seconds(lambda: model(token, **cached), 16)

    def decode_compiled(self, model: Any) -> float:
        cached, token = self.filled(model, self.static_cache(model)), self.ids(model, 1)
        # A CPU traces the model, which says whether it is one graph, and does not wait for inductor.
        how = {"backend": "eager"} if self.machine.dry else {"mode": "reduce-overhead"}
        step = torch.compile(model.forward, fullgraph=True, **how)
        return self.machine.seconds(lambda: step(token.clone(), **cached), 16)

    def decode_in_graph(self, model: Any) -> float:
        cached, token = self.filled(model, self.static_cache(model)), self.ids(model, 1)
        position = torch.full((1, 1), self.prompt, device=self.machine.device)
        return self.machine.in_graph(lambda: model(token, position_ids=position, **cached).logits)

    def static_cache(self, model: Any) -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=self.prompt + 40)


def made(layers: int, machine: Machine) -> Any:
    config = LlamaConfig(**TINY, num_hidden_layers=2) if machine.dry else shapes.config("llama-3-8b")
    config.num_hidden_layers = min(layers, config.num_hidden_layers)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def become(model: Any, contender: str) -> None:
    """Of what it was before: BF16, then FP8, then the host's FP8 linears over the same codes."""
    if contender == "hf_fp8 auto":
        quantize_model(model, "FP8_DYNAMIC", ignore=["lm_head"])
    elif contender == "stock FP8 linear":
        for parent in list(model.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, QuantizedLinear):
                    setattr(parent, name, stock_linear(layer))


@torch.no_grad()
def run(out: Path, machine: Machine) -> None:
    measurements = Measurements(Rows(out / "model.csv", "contender", "what", "ms", "x", "gb", "error"), machine)
    add = measurements.add
    model = made(32, machine)
    for contender in ("BF16", "hf_fp8 auto", "stock FP8 linear"):
        become(model, contender)
        if not machine.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        add(contender, "linears of a token, in a graph", partial(measurements.linears_of_a_token, model))
        add(contender, f"prefill of {measurements.tokens}", partial(measurements.prefill, model))
        add(contender, "decode, eager", partial(measurements.decode, model))
        if contender != "stock FP8 linear":
            add(contender, "decode, in a graph", partial(measurements.decode_in_graph, model))
    del model
    for contender in ("BF16", "hf_fp8 auto"):
        small = made(4, machine)
        become(small, contender)
        add(contender, "decode of 4 layers, compiled", partial(measurements.decode_compiled, small))
