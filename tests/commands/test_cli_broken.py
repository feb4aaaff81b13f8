"""What the command line says of broken, hostile and foreign checkpoints, and of places it cannot write to: an error that names
the file, nothing at DST, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import differing, tensors, tiny_llama, write
from support.commands import config_of, run, saved
from support.special_files import SPECIAL, no_waiting

from hf_fp8.checkpoint.writer import check_place
from hf_fp8.errors import ConfigError
from hf_fp8.quantization import files as rewrite
from hf_fp8.quantization.source import open_source

Config = dict[str, Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return saved(tiny_llama(num_hidden_layers=1), tmp_path / "dense")


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    write(tiny_llama(num_hidden_layers=1), tmp_path / "coded")
    return tmp_path / "coded"


def refused(capsys: Capture, *arguments: object, code: int = 1) -> str:
    """What `hf-fp8 arguments` says, which is one error of ours, and nothing else."""
    capsys.readouterr()
    with no_waiting():
        run(*arguments, code=code)
    said = capsys.readouterr().err
    assert "error: " in said and "Traceback" not in said and "HF_FP8_TRACEBACK" not in said, said
    return said


def edit_config(folder: Path, change: Callable[[Config], Any]) -> None:
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# -- a source that is replaced while it is read --


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))  # a clock may be too coarse to tell


def replace(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


CHANGES = {"changed": touch, "replaced": replace, "removed": Path.unlink}
WATCHED = [
    "config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "README.md", "tokenizer/vocabulary.txt",
]  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", WATCHED)
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    dense = saved(tiny_llama(num_hidden_layers=1), tmp_path / "dense", max_shard_size="60KB")
    assert (dense / "model-00002-of-00002.safetensors").exists()
    (dense / "tokenizer").mkdir()
    (dense / "tokenizer" / "vocabulary.txt").write_text("a b c")
    wrote = rewrite.write_index

    def write_index(*arguments: Any) -> None:
        wrote(*arguments)
        CHANGES[how](dense / name)

    monkeypatch.setattr(rewrite, "write_index", write_index)
    assert name in refused(capsys, "quantize", dense, tmp_path / "fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_so_while_dequantizing_and_an_old_checkpoint_stays(
    tmp_path: Path, coded: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = saved(tiny_llama(seed=5), tmp_path / "out")
    before = tensors(old)
    load = rewrite.Checkpoint.load

    def replaced_at_the_first(self: Any, key: str) -> torch.Tensor:
        monkeypatch.setattr(rewrite.Checkpoint, "load", load)
        state = {name: tensor.clone() for name, tensor in load_file(coded / "model.safetensors").items()}
        save_file(state, coded / "new.safetensors", metadata={"format": "pt"})
        os.replace(coded / "new.safetensors", coded / "model.safetensors")
        return load(self, key)

    monkeypatch.setattr(rewrite.Checkpoint, "load", replaced_at_the_first)
    assert "model.safetensors" in refused(capsys, "dequantize", coded, old, "--overwrite")
    assert differing(tensors(old), before) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coded", "out"]


def test_what_appears_in_the_source_meanwhile_is_not_copied(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote = rewrite.write_index
    monkeypatch.setattr(rewrite, "write_index", lambda *a: (wrote(*a), (dense / "late.txt").write_text("of another model")))
    run("quantize", dense, tmp_path / "fp8")
    assert not (tmp_path / "fp8" / "late.txt").exists() and (tmp_path / "fp8" / "README.md").exists()


# -- where it is written --


def test_mount_points(tmp_path: Path, dense: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is renamed into the place of DST, which a mount point does not let happen, after all the work."""
    (tmp_path / "mounted").mkdir()
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted" or real(path))
    monkeypatch.setattr(rewrite, "ShardWriter", None)  # no work is begun
    assert "mount point" in refused(capsys, "quantize", dense, tmp_path / "mounted")
    assert list((tmp_path / "mounted").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="Linux")
@pytest.mark.parametrize("place", ["/proc", "/"])
def test_mount_points_of_this_machine(place: str) -> None:
    with pytest.raises(ConfigError, match="mount point"):
        check_place(Path(place), "config.json")


def test_places_that_cannot_be_written(tmp_path: Path, dense: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "ShardWriter", None)  # no work is begun
    (tmp_path / "file").touch()
    assert "file is a file" in refused(capsys, "quantize", dense, tmp_path / "file" / "fp8")
    assert "too long" in refused(capsys, "quantize", dense, tmp_path / ("x" * 250))
    refused(capsys, "quantize", dense, tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "is a circular link" in refused(capsys, "quantize", dense, tmp_path / "loop")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"no permission to write to {tmp_path}" in refused(capsys, "quantize", dense, tmp_path / "a" / "b" / "fp8")


def test_names_that_are_no_text(tmp_path: Path, dense: Path, capsys: Capture) -> None:
    """Folders may be called anything; the terminal shows it, and is not told what to do."""
    odd = tmp_path / os.fsdecode(b"a\nb\x1b[31m\xff")
    dense.rename(odd)
    run("quantize", odd, tmp_path / os.fsdecode(b"out\x1b\xfe"))
    for command in ("inspect", "verify"):
        run(command, tmp_path / os.fsdecode(b"out\x1b\xfe"))
    refused(capsys, "verify", odd)
    edit_config(odd, lambda config: config.update(model_type="\x1b[2Jnice"))
    run("inspect", odd, code=1)
    found = capsys.readouterr()
    assert "\x1b" not in found.err + found.out


# -- devices --

NOWHERE = ["nowhere", "meta", "", "cuda:x", "hpu", "fpga", "lazy", "cpu:", "cuda:99"]


@pytest.mark.parametrize("device", NOWHERE if torch.cuda.is_available() else [*NOWHERE, "cuda", "cuda:0"])
def test_devices_that_are_not_there(tmp_path: Path, capsys: Capture, device: str) -> None:
    said = refused(capsys, "quantize", tmp_path / "nothing", tmp_path / "fp8", "--device", device)
    assert f"--device {device}" in said and "nothing" not in said  # it is looked at before any work


@pytest.mark.parametrize("device", ["nowhere", "meta", "", *([] if torch.cuda.is_available() else ["cuda"])])
def test_devices_to_say_what_would_run_on(coded: Path, capsys: Capture, device: str) -> None:
    assert f"--device {device}" in refused(capsys, "inspect", coded, "--device", device)


# -- config.json --

TEXTS: dict[str, bytes] = {
    "nothing": b"", "no JSON": b"{", "a list": b"[]", "null": b"null", "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 200_000, "deep objects": b'{"a":' * 200_000, "a giant number": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"model_type": "llama", "hidden_size": NaN}', "no model_type": b"{}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("command", ["quantize", "dequantize", "inspect", "verify"])
def test_config_json_that_is_none(tmp_path: Path, dense: Path, capsys: Capture, command: str, name: str) -> None:
    (dense / "config.json").write_bytes(TEXTS[name])
    destination = [tmp_path / "out"] if command.endswith("quantize") else []
    assert str(dense / "config.json") in refused(capsys, command, dense, *destination)
    assert not (tmp_path / "out").exists()


GARBAGE: dict[str, Config] = {
    "unknown model_type": {"model_type": "no_such_model"},
    "model_type null": {"model_type": None},
    "model_type number": {"model_type": 7},
    "size text": {"hidden_size": "64"},
    "size null": {"hidden_size": None},
    "size negative": {"hidden_size": -64},
    "no heads": {"num_attention_heads": 0},
    "layers": {"num_hidden_layers": ["a"]},
    "activation": {"hidden_act": "nope"},
    "dtype": {"dtype": "banana"},
    "dtype list": {"dtype": ["a"]},
    "rope": {"rope_parameters": 3},
    "labels": {"id2label": 3},
    "text_config": {"text_config": "x"},
    "another class": {"architectures": ["BertModel"]},
    "code": {"model_type": "other", "auto_map": {"AutoConfig": "c.C"}},
    "other files": {"configuration_files": ["config.4.0.0.json"]},
    "other files number": {"configuration_files": 3},
    "weights elsewhere": {"transformers_weights": "../other.safetensors"},
    "weights number": {"transformers_weights": 3},
    "quantization text": {"quantization_config": "fp8"},
}


@pytest.mark.parametrize("name", GARBAGE)
def test_values_that_make_no_sense(dense: Path, capsys: Capture, name: str) -> None:
    edit_config(dense, lambda config: config.update(GARBAGE[name]))
    assert "config.json" in refused(capsys, "inspect", dense)


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", [3], ["pipeline"], ["AutoConfig"], ["logging"], {"a": 1}])
def test_architectures_that_are_none(dense: Path, named: Any) -> None:
    """The model is then one that `model_type` alone leads to."""
    edit_config(dense, lambda config: config.update(architectures=named))
    run("inspect", dense)


def test_config_json_that_is_no_file(dense: Path, capsys: Capture) -> None:
    for kind, make in SPECIAL.items():
        (dense / "config.json").unlink()
        make(dense / "config.json")
        assert f"config.json is a {kind}" in refused(capsys, "verify", dense)
        if kind == "folder":
            (dense / "config.json").rmdir()
    (dense / "config.json").touch()
    os.truncate(dense / "config.json", 10**12)
    assert "config.json" in refused(capsys, "verify", dense)


def test_text_that_no_encoding_has(tmp_path: Path, dense: Path) -> None:
    edit_config(dense, lambda config: config.update(note="\ud800 schön"))
    run("quantize", dense, tmp_path / "fp8")
    assert config_of(tmp_path / "fp8")["note"] == "\ud800 schön"
    assert (tmp_path / "fp8" / "config.json").read_bytes().isascii()  # whatever the locale is


def test_both_names_of_the_dtype(tmp_path: Path, coded: Path) -> None:
    edit_config(coded, lambda config: config.update(torch_dtype="bfloat16", dtype="bfloat16"))
    run("dequantize", coded, tmp_path / "out", "--dtype", "float32")
    assert {config_of(tmp_path / "out")[key] for key in ("dtype", "torch_dtype")} == {"float32"}


BROKEN: dict[str, tuple[str, str]] = {
    "no tokenizer": ("README.md", "no tokenizer is here"),
    "broken": ("tokenizer_config.json", "{"),
    "a list": ("tokenizer_config.json", "[]"),
    "deep": ("tokenizer_config.json", "[" * 200_000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tokenizers_that_are_none(tmp_path: Path, dense: Path, capsys: Capture, name: str) -> None:
    file, content = BROKEN[name]
    (dense / file).write_text(content)
    (tmp_path / "text.txt").write_text("a b c")
    arguments = [dense, tmp_path / "fp8", "--scheme", "FP8", "--calibrate"]
    assert f"{dense}: transformers cannot load a tokenizer" in refused(capsys, "quantize", *arguments, tmp_path / "text.txt")
    (tmp_path / "text.jsonl").write_text("[" * 200_000)
    assert "line 1" in refused(capsys, "quantize", *arguments, tmp_path / "text.jsonl")


# -- files of weights --


def test_the_file_that_the_config_names_is_read(tmp_path: Path, dense: Path) -> None:
    """As the host does; and what is written goes by the usual name."""
    other = {name: tensor + 1 for name, tensor in load_file(dense / "model.safetensors").items()}
    save_file(other, dense / "special.safetensors", metadata={"format": "pt"})
    edit_config(dense, lambda config: config.update(transformers_weights="special.safetensors"))
    run("quantize", dense, tmp_path / "fp8")
    assert torch.equal(tensors(tmp_path / "fp8")["lm_head.weight"], other["lm_head.weight"])
    assert "transformers_weights" not in config_of(tmp_path / "fp8")
    run("verify", tmp_path / "fp8")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_weights_that_are_no_file(tmp_path: Path, dense: Path, capsys: Capture, kind: str, command: str) -> None:
    (dense / "model.safetensors").unlink()
    SPECIAL[kind](dense / "model.safetensors")
    said = refused(capsys, command, dense, *([tmp_path / "fp8"] if command == "quantize" else []))
    assert f"model.safetensors is a {kind}" in said


def test_a_source_that_is_a_file(tmp_path: Path, dense: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a file" in refused(capsys, "verify", dense / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert "is a file" in refused(capsys, "verify", "dense/model.safetensors")  # not the name of a repository


def test_folders_that_may_not_be_read(dense: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be copied is not left out without a word."""
    (dense / "locked").mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "locked cannot be read (Permission denied)" in refused(capsys, "quantize", dense, dense.parent / "fp8")
    assert not (dense.parent / "fp8").exists()


def test_a_folder_with_an_adapter(dense: Path, capsys: Capture) -> None:
    """transformers takes the adapter's base model, not the weights here."""
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model", "peft_type": "LORA"}')
    assert "adapter_config.json" in refused(capsys, "quantize", dense, dense.parent / "fp8")


# -- other methods than ours --

MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}
INT8 = {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}}
# (quantization_config, what inspect says, whether it says that transformers reads it)
METHODS: dict[str, tuple[Config | None, str, bool]] = {
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (NVFP4)", False),
    "unknown": ({"quant_method": "new_thing"}, "new_thing", False),
    "ours, of no file": ({"quant_method": "hf_fp8"}, "hf_fp8", False),
    "no method": ({"bits": 8}, "quant_method of its config.json is None", False),
    "a list": ({"quant_method": ["fp8"]}, "['fp8']", False),
    "old name, int8": ({"quant_method": "sparseml", **INT8}, "sparseml, with no group that hf-fp8 runs", False),
    "int8": ({"quant_method": "compressed-tensors", **INT8}, "compressed-tensors, with no group that hf-fp8 runs", True),
    "int8, no method": (INT8, "compressed-tensors, with no group that hf-fp8 runs", True),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "gptq", True),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}, "fp8", True),
    "bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes_8bit", True),
    "none": (None, "14 tensors such as", False),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods(tmp_path: Path, coded: Path, capsys: Capture, name: str) -> None:
    config, method, known = METHODS[name]
    edit_config(coded, lambda text: text.update(quantization_config=config) if config else text.pop("quantization_config"))
    run("inspect", coded)
    said = capsys.readouterr().out
    assert "quantized as " in said and method in said
    assert ("transformers reads it without hf-fp8" in said) == known
    assert ("neither hf-fp8 nor transformers" in said and "used as values" in said) == (not known)
    for command, *rest in (["verify"], ["dequantize", tmp_path / "out"]):
        said = refused(capsys, command, coded, *rest)
        assert method in said and ("neither" in said) == (not known)
    said = refused(capsys, "quantize", coded, tmp_path / "out")
    assert method in said and "quantized already" in said and "hf-fp8 dequantize" not in said
    assert not (tmp_path / "out").exists()


def test_what_modelopt_writes_beside_the_config(tmp_path: Path, coded: Path, capsys: Capture) -> None:
    edit_config(coded, lambda text: text.pop("quantization_config"))
    (coded / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    run("inspect", coded)
    said = capsys.readouterr().out
    assert "modelopt (NVFP4)" in said and "neither hf-fp8 nor transformers" in said
    assert "would make" not in said
    for command, *rest in (["verify"], ["dequantize", tmp_path / "out"], ["quantize", tmp_path / "out"]):
        assert "modelopt (NVFP4)" in refused(capsys, command, coded, *rest)


def test_what_modelopt_says_of_the_cache_alone(tmp_path: Path, dense: Path, capsys: Capture) -> None:
    about = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (dense / "hf_quant_config.json").write_text(json.dumps(about))
    run("inspect", dense)
    assert "not quantized" in capsys.readouterr().out
    run("quantize", dense, tmp_path / "fp8")
    assert not (tmp_path / "fp8" / "hf_quant_config.json").exists()  # it is not about what was written
    (dense / "hf_quant_config.json").write_text("{")
    assert "hf_quant_config.json cannot be read" in refused(capsys, "quantize", dense, tmp_path / "other")


def test_dequantized_nothing_says_that_it_is_quantized(tmp_path: Path, coded: Path) -> None:
    (coded / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    run("dequantize", coded, tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert open_source(str(tmp_path / "out")).quantization is None
    run("quantize", tmp_path / "out", tmp_path / "again")
