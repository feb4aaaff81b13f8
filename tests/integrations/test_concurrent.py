"""Threads that load, make, quantize and run models at the same time: each gets its own numbers, and leaves no trace."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.build import IDS, State, differing, load, logits, tensors, tiny_llama, write
from support.moe import is_linear, make, mixtral
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    EncoderDecoderModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from hf_fp8 import (
    FP8_DYNAMIC,
    FP8_STATIC,
    FP8Config,
    calibrate,
    load_quantized,
    merging,
    quality,
    quantize_model,
    save_quantized,
)
from hf_fp8.errors import ConfigError
from hf_fp8.formats import numerics
from hf_fp8.formats.scheme import ROW
from hf_fp8.quantization.files import quantize_checkpoint
from hf_fp8.quantization.observers import Mse
from hf_fp8.quantization.source import open_source

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
THREADS, ROUNDS = 8, 4
# Nothing here takes long; a thread that waits for another one that waits for it would wait for ever.
SOON = 60.0


def opt() -> PreTrainedModel:
    config = OPTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, ffn_dim=96, word_embed_proj_dim=64,
        max_position_embeddings=64, dtype="bfloat16", bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return make(OPTForCausalLM, config)


# OPT and this Llama have tied embeddings, the mixture has none.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": opt, "llama": lambda: tiny_llama(tie_word_embeddings=True), "mixtral": mixtral,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint for each family, dense and in FP8 ("opt", "opt fp8")."""
    top = tmp_path_factory.mktemp("concurrent")
    for name, family in FAMILIES.items():
        family().save_pretrained(top / name)
        write(family(), top / f"{name} fp8", quantized=is_linear, ignore=["lm_head", "re:.*gate$"])
    return {path.name: path for path in top.iterdir()}


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """What the whole process sees is afterwards as before; and is so for the next test, whatever happened in this one."""
    tie, linspace = PreTrainedModel.tie_weights, torch.linspace
    yield
    found = torch.get_default_dtype(), PreTrainedModel.tie_weights, torch.linspace
    torch.set_default_dtype(torch.float32)
    PreTrainedModel.tie_weights, torch.linspace = tie, linspace
    assert found == (torch.float32, tie, linspace)


def state_of(model: nn.Module) -> State:
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def read(folders: dict[str, Path], name: str, dtype: torch.dtype) -> PreTrainedModel:
    if name.endswith("fp8"):
        return load(folders[name], dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)


def wrong(model: PreTrainedModel, found: torch.Tensor, right: tuple[State, torch.Tensor]) -> list[str]:
    """Names of parameters and buffers that are not as in the model that was loaded alone, or "logits"."""
    state, expected = state_of(model), right[0]
    lost = [name for name, tensor in state.items() if tensor.device != expected[name].device]
    names = lost or differing(state, expected)
    return names or ([] if torch.equal(found, right[1]) else ["logits"])


class Held:
    """A thread that calls `work`, and waits in the first constructor of `cls` that it comes to until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cls: type[nn.Module], work: Callable[[], Any]) -> None:
        self.inside, self._on = threading.Event(), threading.Event()
        self._result: Any = None
        host = cls.__init__

        def init(model: Any, *args: Any, **kwargs: Any) -> None:
            if threading.current_thread() is self._thread:
                self.inside.set()
                self._on.wait(SOON)
            host(model, *args, **kwargs)

        def run() -> None:
            self._result = work()

        monkeypatch.setattr(cls, "__init__", init)
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def go(self) -> Any:
        """Let it go, and wait for what it returns."""
        self._on.set()
        self._thread.join(SOON)
        assert not self._thread.is_alive()
        return self._result


def while_another_builds(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], work: Callable[[], Any]) -> Any:
    """What `work` returns if another thread is about to build an OPT in bfloat16 when it starts; it may wait for that one."""
    other = Held(monkeypatch, OPTForCausalLM, lambda: read(folders, "opt", torch.bfloat16))
    assert other.inside.wait(SOON)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(work)
        threading.Timer(0.5, other._on.set).start()
        found = ours.result(SOON)
    other.go()
    return found


# -- loading --


@pytest.mark.parametrize("kind", ["", " fp8"], ids=["dense", "fp8"])
def test_loading_in_many_threads(folders: dict[str, Path], kind: str) -> None:
    """Each with a family and a dtype of its own, and run at once."""
    cases = [(name + kind, dtype) for name in FAMILIES for dtype in FLOATS]
    right = {}
    for case in cases:
        alone = read(folders, *case)
        right[case] = state_of(alone), logits(alone)
        assert right[case][1].isfinite().all()

    def work(case: tuple[str, torch.dtype], start: threading.Barrier) -> str | None:
        start.wait(SOON)
        model = read(folders, *case)
        try:
            found = wrong(model, logits(model), right[case])
        except RuntimeError as error:  # dtypes that do not go together
            return f"{case}: {error}"
        return f"{case}: {found}" if found else None

    failures = []
    for number in range(ROUNDS):
        start = threading.Barrier(THREADS)
        with ThreadPoolExecutor(THREADS) as pool:
            jobs = [pool.submit(work, cases[(number + at) % len(cases)], start) for at in range(THREADS)]
            failures += [failure for job in jobs if (failure := job.result(SOON))]
    assert failures == []


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["llama", "llama fp8", "mixtral", "mixtral fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loading_while_another_thread_builds(
    folders: dict[str, Path], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default dtype is the other model's meanwhile, and `tie_weights` does nothing."""
    alone = read(folders, name, dtype)
    right = state_of(alone), logits(alone)

    def work() -> list[str]:
        model = read(folders, name, dtype)
        return wrong(model, logits(model), right)

    assert while_another_builds(monkeypatch, folders, work) == []


@pytest.mark.parametrize("made", ["loaded", "from_config", "on disk"])
def test_overlapping_leaves_nothing_behind(folders: dict[str, Path], made: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A begins, B begins, A ends, B ends: B would put back, for good, what it found, which was A's."""
    path = folders["llama"]
    ways: dict[str, Callable[[], Any]] = {
        "loaded": lambda: read(folders, "llama", torch.float16),
        "from_config": lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float16),
        "on disk": lambda: quantize_checkpoint(open_source(str(path)), tmp_path / "made", FP8Config(scheme="FP8_DYNAMIC")),
    }
    first = Held(monkeypatch, OPTForCausalLM, lambda: read(folders, "opt", torch.bfloat16))
    assert first.inside.wait(SOON)
    second = Held(monkeypatch, LlamaForCausalLM, ways[made])
    second.inside.wait(0.5)  # it waits before that if it is in order
    assert next(first.go().parameters()).dtype == torch.bfloat16
    assert second.inside.wait(SOON)
    assert second.go() is not None
    again = read(folders, "llama", torch.float32)  # in one thread, when all is over; `process` looks at the rest
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_models_that_load_their_parts(tmp_path: Path) -> None:
    """A thread that is loading loads again; several do so at the same time, and none waits for ever."""
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    BertModel(config).save_pretrained(tmp_path / "part")

    class Composite(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            with torch.device("cpu"):
                self.part = BertModel.from_pretrained(tmp_path / "part")

    tiny_llama().save_pretrained(tmp_path / "whole")

    def work(number: int) -> PreTrainedModel:
        if number % 2:
            return EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "part", tmp_path / "part")
        return Composite.from_pretrained(tmp_path / "whole")

    with ThreadPoolExecutor(4) as pool:
        assert len([job.result(SOON) for job in [pool.submit(work, number) for number in range(4)]]) == 4


def test_an_error_lets_the_next_one_load(folders: dict[str, Path], tmp_path: Path) -> None:
    def failing() -> None:
        with pytest.raises(ConfigError):
            AutoModelForCausalLM.from_pretrained(folders["llama fp8"], quantization_config={"nonsense": 1})

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(failing).result(SOON)
            assert pool.submit(load, folders["llama fp8"]).result(SOON)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("where", ["building", "reading"])
def test_a_fork_while_another_thread_loads(folders: dict[str, Path], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has neither the other thread's half-made changes, nor a lock that nobody will open."""
    right = logits(read(folders, "llama", torch.float32))
    inside, on = threading.Event(), threading.Event()
    owner, name = (OPTForCausalLM, "__init__") if where == "building" else (PreTrainedModel, "_load_pretrained_model")
    host = getattr(owner, name)

    def hold(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is other:
            inside.set()
            on.wait(SOON)
        return host(*args, **kwargs)

    monkeypatch.setattr(owner, name, hold if where == "building" else staticmethod(hold))
    other = threading.Thread(target=read, args=(folders, "opt", torch.bfloat16), daemon=True)
    other.start()
    assert inside.wait(SOON)
    # While files are read the fork waits for nobody: the other thread goes on when the child has answered.
    timer = threading.Timer(0.5 if where == "building" else SOON, on.set)
    timer.start()
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        # The first to use torch in a child renews its thread pool; several at once may find none ("Invalid thread pool").
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        sender.send(torch.equal(logits(read(folders, "llama", torch.float32)), right))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()  # so that a child that fails is no child that hangs
    try:
        assert receiver.poll(20), "the child hangs"
        assert receiver.recv() is True
    finally:
        process.kill()
        process.join()
        timer.cancel()
        on.set()
        other.join(SOON)


# -- what hf_fp8 computes, while another thread has changed torch's default dtype --


def adapted() -> Any:
    model = get_peft_model(quantize_model(tiny_llama(), FP8_DYNAMIC), LoraConfig(target_modules="all-linear", r=4))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * 0.05)
    return model


def merged(model: Any) -> State:
    with merging(rounding="stochastic", seed=0):
        return state_of(model.merge_and_unload())


def calibrated(model: Any) -> State:
    with calibrate(model, "mse"), torch.no_grad():
        model(IDS)
    return {name: tensor for name, tensor in state_of(model).items() if "input_scale" in name}


def observed(_: Any) -> State:
    observer = Mse().started(1, torch.device("cpu"))
    observer.observe(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32))
    values, counts = observer._values()
    return {"values": values, "counts": counts, "threshold": observer.threshold()}


def empty_scale(_: Any) -> State:
    return {"scale": numerics.compute_scale(torch.zeros(0, 4, dtype=torch.bfloat16), ROW)}


WORK: dict[str, tuple[Callable[[], Any], Callable[[Any], State]]] = {
    "merging": (adapted, merged),
    "calibrating experts": (lambda: quantize_model(mixtral(), FP8_STATIC, experts="fp8"), calibrated),
    "calibrating": (lambda: quantize_model(tiny_llama(), FP8_STATIC), calibrated),
    "an observer": (lambda: None, observed),
    "a scale of nothing": (lambda: None, empty_scale),
    "quantizing": (mixtral, lambda model: state_of(quantize_model(model, FP8_DYNAMIC, experts="fp8"))),
    "running": (lambda: quantize_model(mixtral(), FP8_DYNAMIC, experts="fp8"), lambda model: {"logits": logits(model)}),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_number(work: str, default: torch.dtype) -> None:
    """As another thread sets it while it builds a model, or the user for good."""
    prepare, compute = WORK[work]
    model = prepare()
    expected = compute(copy.deepcopy(model))
    torch.set_default_dtype(default)
    try:
        found = compute(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert differing(found, expected) == []


def test_working_while_others_load(folders: dict[str, Path], tmp_path: Path) -> None:
    """Calibrating, merging, quantizing on disk and saving in some threads, loading in others."""
    static = quantize_model(mixtral(), FP8_STATIC, experts="fp8")
    lora = adapted()
    source = folders["mixtral"]

    def on_disk(name: str) -> State:
        quantize_checkpoint(open_source(str(source)), tmp_path / name, FP8Config(scheme="FP8_DYNAMIC"))
        return tensors(tmp_path / name)

    def saved(name: str) -> State:
        read(folders, "mixtral fp8", torch.bfloat16).save_pretrained(tmp_path / name)
        return tensors(tmp_path / name)

    jobs: list[Callable[[str], State]] = [
        lambda name: calibrated(copy.deepcopy(static)),
        lambda name: merged(copy.deepcopy(lora)),
        on_disk,
        saved,
    ]
    right = [job(f"right{at}") for at, job in enumerate(jobs)]
    stop = threading.Event()

    def loading() -> None:
        for dtype in itertools.cycle(FLOATS[:2]):
            if stop.is_set():
                return
            read(folders, "opt", dtype)

    def work(at: int, number: int) -> list[str]:
        return differing(jobs[at](f"{at}-{number}"), right[at])

    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(loading) for _ in range(2)]
        try:
            found = [pool.submit(work, at, number) for number in range(5) for at in range(len(jobs))]
            assert [job.result(SOON) for job in found] == [[]] * len(found)
        finally:
            stop.set()
        for other in others:
            other.result(SOON)


# -- what of hf_fp8 itself the whole process shares --


def test_overlapping_quality_leaves_compiled_models_compiled() -> None:
    models = [nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2)]
    first, second, over = threading.Event(), threading.Event(), threading.Event()
    stance = torch._dynamo.eval_frame._stance.stance

    def data(mine: threading.Event, until: threading.Event) -> Iterator[torch.Tensor]:
        yield torch.ones(1, 32)
        mine.set()
        until.wait(SOON)

    def run(model: nn.Module, mine: threading.Event, until: threading.Event) -> None:
        quality(model, quantize_model(model, FP8_DYNAMIC, inplace=False), data(mine, until))

    try:
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(run, models[0], first, second)
            assert first.wait(SOON)
            two = pool.submit(run, models[1], second, over)
            one.result(SOON)
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"  # the second still runs
            over.set()
            two.result(SOON)
        assert torch._dynamo.eval_frame._stance.stance == stance
    finally:
        torch.compiler.set_stance(stance)


def test_a_folder_that_another_thread_moves_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether it is there and the look into it."""
    model, path = quantize_model(nn.Sequential(nn.Linear(32, 32)), FP8_DYNAMIC), tmp_path / "saved"
    save_quantized(model, path)
    iterdir = Path.iterdir

    def gone(folder: Path) -> Iterator[Path]:
        if folder == path:
            path.rename(tmp_path / "aside")
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(ConfigError, match="at the same time"):
        save_quantized(model, path)
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["aside"]


def test_two_threads_write_one_folder(tmp_path: Path) -> None:
    """One does it; the others say so, in our own words; what is there is whole."""
    model = quantize_model(nn.Sequential(nn.Linear(32, 32)), FP8_DYNAMIC)

    def work(start: threading.Barrier, path: Path) -> Exception | None:
        start.wait(SOON)
        try:
            save_quantized(model, path)
        except Exception as error:
            return error
        return None

    errors: list[Exception | None] = []
    for number in range(10):
        start, path = threading.Barrier(4), tmp_path / str(number)
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(work, start, path) for _ in range(4)]
            found = [job.result(SOON) for job in jobs]
        assert None in found
        errors += found
        assert differing(state_of(load_quantized(nn.Sequential(nn.Linear(32, 32)), path)), state_of(model)) == []
        assert json.loads((path / "quantization.json").read_text())["modules"]
    assert {type(error) for error in errors} <= {type(None), ConfigError}
