"""llama.cpp as a contender of `scripts/bench model`: its C functions through llama-cpp-python, over the same weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import gguf_files, peers
from .memory import watched
from .provenance import version
from .timing import Cost, cost_of
from .worker import serve


class Form(NamedTuple):
    """Types of the linears, and of embedding and lm_head; whether weights are repacked for the CPU when they are loaded."""

    linears: str
    ends: str
    repacked: bool = True


# Q8_0 for both is what llama.cpp's own quantizer makes. Its kernels for weights repacked for AMX ended with SIGSEGV for more
# than one token (llama-cpp-python 0.3.36 on a Xeon, a virtual machine), so there is a contender without.
CONTENDERS = {
    "llama.cpp Q8_0": Form("Q8_0", "Q8_0"),
    "llama.cpp Q8_0, not repacked": Form("Q8_0", "Q8_0", repacked=False),
    "llama.cpp Q8_0, lm_head F16": Form("Q8_0", "F16"),
    "llama.cpp F16": Form("F16", "F16"),
}


class Model:
    """A GGUF file in a context for one sequence, which computes the logits of every token, as models of transformers do."""

    def __init__(self, path: Path, threads: int, most: int, *, repacked: bool = True) -> None:
        """most: tokens at a time and in the sequence."""
        import llama_cpp

        self._c = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = repacked
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = most
        context.n_threads = context.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, context)
        self._batch = llama_cpp.llama_batch_init(most, 0, 1)
        self.bytes: int = llama_cpp.llama_model_size(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def __call__(self, ids: Sequence[int], start: int = 0) -> None:
        """Run tokens from a position on; what the cache holds from there on is forgotten."""
        if start == 0:
            self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if code := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with {code}")
        self._c.llama_synchronize(self._context)

    def logits(self) -> torch.Tensor:
        """Of the tokens that were run last."""
        shape = self._batch.n_tokens, self.vocabulary
        at = ctypes.cast(self._c.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float * (shape[0] * shape[1])))
        return torch.frombuffer(at.contents, dtype=torch.float32).clone().reshape(shape)


def work(path: str, folder: str, name: str, tokens: int, prompt: int, steps: int, threads: int) -> None:
    """In a process: load, then answer "prefill" of `tokens`, and "decode" of single ones after `prompt`, with their costs.

    folder: for the GGUF file.
    """
    linears, ends, repacked = CONTENDERS[name]
    try:
        import llama_cpp  # noqa: F401  before a file is written for it
    except ImportError as error:
        raise SystemExit(peers.why_not(error)) from None
    file = gguf_files.write(Path(path), linears, ends, Path(folder))
    with watched() as memory:
        model = Model(file, threads, max(tokens, prompt + steps), repacked=repacked)
    ids = torch.randint(0, model.vocabulary, (max(tokens, prompt),)).tolist()

    def prefill() -> list[Cost]:
        return [cost_of(lambda: model(ids[:tokens]), "cpu")]

    def decode() -> list[Cost]:
        model(ids[:prompt])
        return [cost_of(lambda i=i: model([ids[i]], prompt + i), "cpu") for i in range(steps)][2:]  # type: ignore[misc]

    prefill()
    first = {
        "load_s": memory.seconds, "load_cpu_s": memory.cpu_seconds, "load_peak_gb": memory.used, "held_gb": model.bytes / 1e9,
        "dtype": linears, "note": f"llama-cpp-python {version('llama-cpp-python')}, embedding and lm_head {ends}",
    }  # fmt: skip
    serve(first, {"prefill": prefill, "decode": decode})
