"""The command line: what it writes, what it says, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.build import State, differing, error, load, logits, sqnr, stock_transformers, tensors, tiny_llama, write
from support.commands import config_of, run, saved
from support.moe import MOE, deepseek_v3, gpt_oss, is_linear, llama4, mixtral, qwen3_moe
from transformers import AutoModelForCausalLM

from hf_fp8 import FP8Config, cli
from hf_fp8.checkpoint.writer import whole_folder
from hf_fp8.errors import ConfigError
from hf_fp8.quantization.observers import OBSERVERS

SCHEMES = ["FP8_DYNAMIC", "FP8_BLOCK", "FP8_WEIGHT_ONLY", "FP8_TENSOR"]


def test_observers_are_those_of_calibrate() -> None:
    """`cli` repeats their names: it imports no torch for `--help`."""
    assert get_args(cli.ObserverName) == tuple(OBSERVERS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_writes_what_loading_would_save(tmp_path: Path, scheme: str) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense")
    run("quantize", dense, tmp_path / "fp8", "--scheme", scheme)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=FP8Config(scheme))
    model.save_pretrained(tmp_path / "saved")
    assert differing(tensors(tmp_path / "fp8"), tensors(tmp_path / "saved")) == []
    assert config_of(tmp_path / "fp8") == config_of(tmp_path / "saved")
    assert (tmp_path / "fp8" / "README.md").read_text() == (dense / "README.md").read_text()
    with safe_open(tmp_path / "fp8" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", [mixtral, qwen3_moe, deepseek_v3, gpt_oss, llama4])
def test_experts(tmp_path: Path, family) -> None:
    """One tensor per expert, whether the files stack them or not; the same as loading makes, and back."""
    dense = saved(family(), tmp_path / "dense")
    run("quantize", dense, tmp_path / "fp8")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=FP8Config("FP8_DYNAMIC"))
    model.save_pretrained(tmp_path / "saved")
    found = tensors(tmp_path / "fp8")
    # DeepSeek's is bfloat16 in this test's file, and the model holds it in float32.
    different = differing(found, tensors(tmp_path / "saved"))
    assert [name for name in different if not name.endswith("e_score_correction_bias")] == []
    experts = [name for name in found if ".experts." in name and name.endswith("weight_scale")]
    assert len(experts) == {deepseek_v3: 12}.get(family, 24)
    run("dequantize", tmp_path / "fp8", tmp_path / "back")
    back = load(tmp_path / "back", None, dtype=torch.float32)
    assert error(logits(back), logits(load(tmp_path / "fp8", FP8Config(dequantize=True), dtype=torch.bfloat16).float())) < 1e-5


def test_dense_experts_and_groups(tmp_path: Path) -> None:
    dense = saved(qwen3_moe(), tmp_path / "dense")
    run("quantize", dense, tmp_path / "a", "--dense-experts", "--ignore", "re:.*o_proj")
    assert not [n for n in tensors(tmp_path / "a") if n.endswith("_scale") and ("experts" in n or "o_proj" in n)]
    run("quantize", dense, tmp_path / "b", "--scheme", "FP8_BLOCK=re:.*mlp.*", "--scheme", "FP8_DYNAMIC=re:.*self_attn.*")
    groups = config_of(tmp_path / "b")["quantization_config"]["config_groups"]
    assert [group["weights"]["strategy"] for group in groups.values()] == ["block", "channel"]
    load(tmp_path / "b")


@pytest.mark.parametrize("family", [gpt_oss, llama4])
def test_stacked_experts_that_stay_dense(tmp_path: Path, family) -> None:
    """As the files have them; but Llama-4's apart, as stock transformers looks for them beside codes."""
    dense = saved(family(), tmp_path / "dense")
    run("quantize", dense, tmp_path / "fp8", "--dense-experts", "--scheme", "FP8_WEIGHT_ONLY")
    apart = [name for name in tensors(tmp_path / "fp8") if ".experts.0." in name]
    assert bool(apart) == (family is llama4) and not [name for name in apart if name.endswith("_scale")]
    ours = logits(load(tmp_path / "fp8"))
    assert sqnr(ours, logits(AutoModelForCausalLM.from_pretrained(dense))) > 20
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
        assert error(logits(stock), ours) < 1e-5


@pytest.mark.parametrize("family", [mixtral, gpt_oss])
def test_experts_are_calibrated(tmp_path: Path, tokenizer: Path, family) -> None:
    dense = saved(family(), tmp_path / "dense")
    for file in tokenizer.iterdir():
        (dense / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 40)
    run("quantize", dense, tmp_path / "fp8", "--scheme", "FP8", "--calibrate", tmp_path / "text.txt")
    scales = {n: t for n, t in tensors(tmp_path / "fp8").items() if n.endswith("input_scale")}
    assert len([name for name in scales if ".experts." in name]) == 24
    assert all(t.shape == (1,) and 0 < t < 1 for t in scales.values())
    run("verify", tmp_path / "fp8")


def test_shards_and_index(tmp_path: Path) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense", max_shard_size="50KB")
    count = len(list(dense.glob("*.safetensors")))
    assert count > 3
    run("quantize", dense, tmp_path / "fp8")
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == count
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "fp8" / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "fp8").values())
    run("verify", tmp_path / "fp8")


def test_dequantize_is_what_loading_dequantizes(tmp_path: Path) -> None:
    write(tiny_llama(), tmp_path / "fp8")
    run("dequantize", tmp_path / "fp8", tmp_path / "dense", "--dtype", "float32")
    assert "quantization_config" not in config_of(tmp_path / "dense") and config_of(tmp_path / "dense")["dtype"] == "float32"
    model = load(tmp_path / "fp8", FP8Config(dequantize=True))
    found = tensors(tmp_path / "dense")
    for name, value in model.state_dict().items():
        assert torch.equal(found[name].float(), value), name
    assert not [name for name in found if "scale" in name]


@pytest.mark.parametrize("family", MOE)
def test_dequantize_names_what_saving_names(family: str, tmp_path: Path) -> None:
    """Experts, too: one by one where the family's files hold them so, stacked where transformers looks for stacks."""
    write(MOE[family](), tmp_path / "fp8", quantized=is_linear)
    run("dequantize", tmp_path / "fp8", tmp_path / "dense")
    load(tmp_path / "fp8", FP8Config(dequantize=True), dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert differing(tensors(tmp_path / "saved"), tensors(tmp_path / "dense")) == []


def test_calibrated(tmp_path: Path, tokenizer: Path) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense")
    for file in tokenizer.iterdir():
        (dense / file.name).write_bytes(file.read_bytes())
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "a b c d e f g h " * n}) for n in (2, 3)))
    run("quantize", dense, tmp_path / "fp8", "--scheme", "FP8", code=1)
    assert not (tmp_path / "fp8").exists()
    run("quantize", dense, tmp_path / "fp8", "--scheme", "FP8", "--calibrate", text)
    scales = {n: t for n, t in tensors(tmp_path / "fp8").items() if n.endswith("input_scale")}
    assert len(scales) == 14 and all(t.shape == (1,) and 0 < t < 1 for t in scales.values())
    assert scales["model.layers.0.self_attn.q_proj.input_scale"] == scales["model.layers.0.self_attn.k_proj.input_scale"]
    assert torch.isfinite(logits(load(tmp_path / "fp8", FP8Config(backend="scaled_mm")))).all()
    run("quantize", dense, tmp_path / "other", "--calibrate", text, code=2)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *"abcdefgh"])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_inspect(tmp_path: Path, capsys) -> None:
    write(tiny_llama(), tmp_path / "fp8")
    run("inspect", tmp_path / "fp8")
    said = capsys.readouterr().out
    assert "channel x token (dynamic)" in said and "model.layers.*.mlp.down_proj" in said and "lm_head" in said
    run("inspect", tmp_path / "fp8", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["groups"][0]["matrices"] == 14 and len(found["modules"]) == 14
    assert found["bytes"] == sum(t.nbytes for t in tensors(tmp_path / "fp8").values())
    dense = saved(tiny_llama(), tmp_path / "dense")
    run("inspect", dense)
    assert "FP8_DYNAMIC would make 14 matrices FP8" in capsys.readouterr().out


def test_verify_names_what_is_wrong(tmp_path: Path, capsys) -> None:
    out, _ = write(tiny_llama(), tmp_path / "fp8")
    run("verify", tmp_path / "fp8")
    assert "nothing wrong found" in capsys.readouterr().out

    def broken(edit, name: str) -> None:
        state = {key: value.clone() for key, value in out.items()}
        edit(state)
        save_file(state, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
        run("verify", tmp_path / "fp8", code=1)
        assert name in capsys.readouterr().err

    key = "model.layers.1.mlp.up_proj.weight"

    def nan_code(state: State) -> None:
        state[key].view(torch.uint8)[0, 0] = 0xFF

    broken(nan_code, key)
    broken(lambda state: state.pop(f"{key}_scale"), f"{key}_scale")
    broken(lambda state: state[f"{key}_scale"].zero_(), f"{key}_scale")
    broken(lambda state: state.pop("model.norm.weight"), "model.norm.weight")


def test_nothing_is_written_after_an_error(tmp_path: Path, capsys) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    dense = saved(model, tmp_path / "dense")
    run("quantize", dense, tmp_path / "fp8", code=1)
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
    run("quantize", dense, dense / "inside", code=1)
    run("quantize", dense, dense, "--overwrite", code=1)
    run("quantize", tmp_path / "nothing", tmp_path / "fp8", code=1)
    run("quantize", dense, tmp_path / "fp8", "--scheme", "NVFP4", code=1)
    write(tiny_llama(), tmp_path / "done")
    run("quantize", tmp_path / "done", tmp_path / "fp8", code=1)
    assert "quantized already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "done"]


def test_overwrites_only_a_checkpoint_and_only_when_asked(tmp_path: Path) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense")
    run("quantize", dense, tmp_path / "fp8")
    before = tensors(tmp_path / "fp8")
    run("quantize", dense, tmp_path / "fp8", "--scheme", "FP8_BLOCK", code=1)
    assert differing(tensors(tmp_path / "fp8"), before) == []
    run("quantize", dense, tmp_path / "fp8", "--scheme", "FP8_BLOCK", "--overwrite")
    assert differing(tensors(tmp_path / "fp8"), before) != []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    run("quantize", dense, tmp_path / "mine", "--overwrite", code=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "fp8", "mine"]


def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with whole_folder(path) as part:
        (part / "config.json").write_text("1")
    with pytest.raises(KeyboardInterrupt), whole_folder(path, replaces="config.json") as part:
        (part / "config.json").write_text("2")
        raise KeyboardInterrupt
    assert (path / "config.json").read_text() == "1" and list(tmp_path.iterdir()) == [path]
    # What a killed process left, in the moment between two renamings, is put back.
    path.rename(tmp_path / ".x.hf-fp8-old")
    with pytest.raises(ConfigError, match="exists already"), whole_folder(path):
        pass
    assert (path / "config.json").read_text() == "1" and list(tmp_path.iterdir()) == [path]
    # One that was killed later, while it deleted the former checkpoint, is in nobody's way.
    (tmp_path / ".x.hf-fp8-old").mkdir()
    (tmp_path / ".x.hf-fp8-old" / "config.json").write_text("0")
    with whole_folder(path, replaces="config.json") as part:
        (part / "config.json").write_text("2")
    assert (path / "config.json").read_text() == "2" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_renaming_that_fails_loses_nothing(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls, rename = tmp_path / "x", [], Path.rename
    saved(tiny_llama(num_hidden_layers=1), path)
    before = tensors(path)

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == fails:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="no"), whole_folder(path, replaces="config.json") as part:
        (part / "config.json").write_text("{}")
    assert differing(tensors(path), before) == [] and list(tmp_path.iterdir()) == [path]


PROGRAM = """
import sys, time
from hf_fp8 import cli
from hf_fp8.formats.storage import OneByteCodes
quantize = OneByteCodes.quantize
def quantize_slowly(*args):
    time.sleep(0.2)
    return quantize(*args)
OneByteCodes.quantize = quantize_slowly
print("ready", flush=True)
cli.main()
"""


@pytest.mark.slow
@pytest.mark.hostless
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(tmp_path: Path, how: signal.Signals) -> None:
    """At any moment: nothing, or a whole checkpoint; and what was left is not in the way of the next run."""
    dense = saved(tiny_llama(num_hidden_layers=1), tmp_path / "dense")
    for moment in {signal.SIGINT: (0.0, 0.25)}.get(how, (0.25,)):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "quantize", dense, tmp_path / "fp8"],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells have their background jobs ignore it
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        while moment and not list(tmp_path.glob(".fp8.part-*")) and process.poll() is None and time.monotonic() < begun + 60:
            time.sleep(0.005)
        time.sleep(moment)
        process.send_signal(how)
        code = process.wait(60)
        # At once, it may come before there is anything to catch it.
        assert code in ((-how,) if how == signal.SIGKILL else (130, -how) if moment == 0 else (130,))
        assert not (tmp_path / "fp8").exists()
        assert bool(list(tmp_path.glob(".fp8.part-*"))) == (how == signal.SIGKILL)
    run("quantize", dense, tmp_path / "fp8")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".fp8.part-")) == ["dense", "fp8"]
    run("verify", tmp_path / "fp8")


def test_what_is_no_checkpoint_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dense = saved(tiny_llama(num_hidden_layers=1), tmp_path / "dense")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"name": "my web app"}')
    checkout = saved(tiny_llama(num_hidden_layers=1), tmp_path / "checkout")
    (checkout / ".git").mkdir()
    for folder, words in ((tmp_path / "app", "not that of a checkpoint"), (checkout, "git repository")):
        held = sorted(path.name for path in folder.iterdir())
        run("quantize", dense, folder, "--overwrite", code=1)
        assert words in " ".join(capsys.readouterr().err.split())
        assert sorted(path.name for path in folder.iterdir()) == held


def test_values_beyond_float16_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e7)
    run("quantize", saved(model, tmp_path / "dense"), tmp_path / "fp8")
    run("dequantize", tmp_path / "fp8", tmp_path / "half", "--dtype", "float16", code=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "mlp.up_proj.weight has values that are not finite in float16" in said and not (tmp_path / "half").exists()
    run("dequantize", tmp_path / "fp8", tmp_path / "whole", "--dtype", "bfloat16")
