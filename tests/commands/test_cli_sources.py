"""Checkpoints that the command line reads: files that contradict each other, places that are taken, text to calibrate with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.build import differing, error, load, logits, stock_transformers, tensors, tiny_llama, write
from support.commands import config_of, run, saved
from support.moe import mixtral
from transformers import AutoModelForCausalLM

from hf_fp8 import FP8Config
from hf_fp8.checkpoint.writer import whole_folder
from hf_fp8.errors import CalibrationError, CheckpointError, ConfigError, CorruptFileError, MissingTensorError
from hf_fp8.quantization.calibration_text import texts, windows
from hf_fp8.quantization.source import open_source


def sharded(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "dense", max_shard_size="50KB")


def test_a_single_file_beside_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The host takes the single file. It is not for us to say that it is the checkpoint."""
    dense = sharded(tmp_path)
    other = tiny_llama(seed=1)
    save_file(other.state_dict(), dense / "model.safetensors", metadata={"format": "pt"})
    run("quantize", dense, tmp_path / "fp8", code=1)
    assert "Delete model.safetensors.index.json if" in capsys.readouterr().err
    (dense / "model.safetensors.index.json").unlink()
    run("quantize", dense, tmp_path / "fp8")
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=FP8Config("FP8_DYNAMIC")).save_pretrained(
        tmp_path / "saved"
    )
    assert differing(tensors(tmp_path / "fp8"), tensors(tmp_path / "saved")) == []


def test_index_and_files_that_contradict_each_other(tmp_path: Path) -> None:
    dense = sharded(tmp_path)
    path = dense / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = index["weight_map"]
    first, last = min(names.values()), max(names.values())
    moved = next(name for name, file in names.items() if file == first)

    def written(weight_map: object) -> Path:
        path.write_text(json.dumps({**index, "weight_map": weight_map}))
        return dense

    with pytest.raises(CheckpointError, match=moved):  # it is in one file, and the index has it in another
        _ = open_source(str(written({**names, moved: last}))).checkpoint
    with pytest.raises(MissingTensorError, match="more"):
        _ = open_source(str(written({**names, "more": last}))).checkpoint
    with pytest.raises(CheckpointError, match=moved):
        _ = open_source(str(written({n: f for n, f in names.items() if n != moved}))).checkpoint
    for bad in ({"a": "../outside.safetensors"}, ["a"], {"a": 1}):
        with pytest.raises(CorruptFileError):
            open_source(str(written(bad)))
    written(names)
    twice = load_file(dense / last) | {moved: torch.zeros_like(load_file(dense / first)[moved])}
    save_file(twice, dense / last, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{moved} is in .*{first}.* and in .*{last}"):  # and not the same in both
        _ = open_source(str(dense)).checkpoint
    twice[moved] = load_file(dense / first)[moved]
    save_file(twice, dense / last, metadata={"format": "pt"})
    assert moved in open_source(str(dense)).checkpoint.tensors
    run("quantize", dense, tmp_path / "fp8")
    assert moved in tensors(tmp_path / "fp8")


def test_the_dtype_is_that_of_the_files_if_the_config_says_none(tmp_path: Path) -> None:
    write(tiny_llama().half(), tmp_path / "fp8", config_edit=lambda c: c.pop("dtype"), scale_dtype=torch.float16)
    run("dequantize", tmp_path / "fp8", tmp_path / "dense")
    assert {tensor.dtype for tensor in tensors(tmp_path / "dense").values()} == {torch.float16}
    assert config_of(tmp_path / "dense")["dtype"] == "float16"


def test_dtypes_that_torch_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense")
    file = dense / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"BF16"', b'"dtype":"F6_2"', 1) if b'"dtype":"BF16"' in data else data)
    run("quantize", dense, tmp_path / "fp8", code=1)
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "fp8").exists()


def test_places_in_one_another(tmp_path: Path) -> None:
    inner = saved(tiny_llama(), tmp_path / "outer" / "inner")
    saved(tiny_llama(), tmp_path / "outer")
    run("quantize", inner, tmp_path / "outer", "--overwrite", code=1)
    run("quantize", tmp_path / "outer", inner / "fp8", code=1)
    dense = saved(tiny_llama(seed=1), tmp_path / "dense")
    run("quantize", dense, tmp_path / "outer", "--overwrite", code=1)  # another checkpoint is in there
    assert (inner / "model.safetensors").exists() and (tmp_path / "outer" / "model.safetensors").exists()


def test_what_appears_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"), whole_folder(tmp_path / "x") as part:
        (part / "config.json").write_text("{}")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis.txt").write_text("years")
    assert (tmp_path / "x" / "thesis.txt").read_text() == "years"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_links(tmp_path: Path) -> None:
    """A folder of links, as the Hub's cache has it, and a link in the place of DST."""
    dense = saved(tiny_llama(), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in dense.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run("quantize", tmp_path / "snapshot", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model.safetensors").is_file()
    assert not any(file.is_symlink() for file in (tmp_path / "real").iterdir())


def test_folders_are_copied_and_patterns_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (dense / "original").mkdir()
    (dense / "original" / "consolidated.00.pth").write_text("weights")
    run("quantize", dense, tmp_path / "fp8", "--target", "re:.*[a-z]_proj", "--ignore", "re:.*o_porj")
    assert "re:.*o_porj" in capsys.readouterr().err
    assert (tmp_path / "fp8" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "fp8" / "original").exists()
    run("inspect", tmp_path / "fp8")
    assert "re:.*[a-z]_proj" in capsys.readouterr().out
    run("quantize", dense, tmp_path / "b", "--scheme", "FP8_BLOCK=re:.*mlp.*", "--target", "Linear", code=2)
    run("quantize", dense, tmp_path / "b", "--device", "nowhere", code=1)
    run("quantize", tmp_path / "dnse", tmp_path / "b", code=1)
    assert "neither a folder" in capsys.readouterr().err


def test_experts_that_others_took_apart(tmp_path: Path) -> None:
    """Mixtral under llm-compressor's names: dense again, stock transformers loads it."""
    rename = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

    def names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {".".join(rename.get(part, part) for part in key.split(".")): value for key, value in state.items()}

    write(
        mixtral(), tmp_path / "fp8", quantized=lambda n: ".experts." in n or "_proj" in n, ignore=["lm_head", "re:.*gate$"],
        edit=names,
    )  # fmt: skip
    wanted = logits(load(tmp_path / "fp8", FP8Config(dequantize=True), dtype=torch.bfloat16))
    run("dequantize", tmp_path / "fp8", tmp_path / "dense")
    with stock_transformers():
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)), wanted)


class Tokenizer:
    """Ids are the characters' numbers; 1 goes before a text, and a template writes it itself."""

    chat_template: str | None = "template"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "\x01" + "".join(message["content"] for message in messages)

    def __call__(self, text: str, return_tensors: str, add_special_tokens: bool = True) -> object:
        ids = [1] * add_special_tokens + [ord(letter) for letter in text]
        return type("Encoding", (), {"input_ids": torch.tensor([ids])})


def test_text_to_calibrate_with(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('\ufeff{"text": "a\u2028b"}\n\n{"messages": [{"role": "user", "content": "cd"}]}\n', encoding="utf-8")
    found = [piece.tolist() for piece in windows(file, Tokenizer(), 3, 100)]
    assert found == [[[1, 97, 0x2028]], [[98]], [[1, 99, 100]]]  # one beginning each
    assert sum(piece.numel() for piece in windows(file, Tokenizer(), 3, 5)) == 5
    (tmp_path / "plain.txt").write_text("abc")
    assert list(texts(tmp_path / "plain.txt")) == ["abc"]
    for bad in ("{", '{"text": ["a"]}', '{"messages": ["x"]}', '{"messages": []}', "[]"):
        file.write_text(bad)
        with pytest.raises(CheckpointError, match="line 1"):
            list(texts(file))
    file.write_text("")
    with pytest.raises(CalibrationError, match="no text"):
        windows(file, Tokenizer(), 3, 5)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CorruptFileError, match="UTF-8"):
        list(texts(tmp_path / "latin.txt"))
    with pytest.raises(ConfigError, match="not a file"):
        list(texts(tmp_path / "nothing.txt"))


def test_verify_and_inspect_all_that_llm_compressor_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in sorted(path for path in (Path(__file__).parents[1] / "data").iterdir() if path.is_dir()):
        run("verify", folder)
        run("inspect", folder)
        assert "scale" not in capsys.readouterr().err, folder
        run("dequantize", folder, tmp_path / folder.name)
        assert "quantization_config" not in config_of(tmp_path / folder.name)


def test_read_only(tmp_path: Path) -> None:
    dense = saved(tiny_llama(), tmp_path / "dense")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    run("quantize", dense, tmp_path / "locked" / "fp8", code=1)


def test_error_of_quantized_files_against_dense_ones(tmp_path: Path) -> None:
    """What comes back from FP8 is near what went in, in every layer."""
    dense = saved(tiny_llama(), tmp_path / "dense")
    run("quantize", dense, tmp_path / "fp8", "--scheme", "FP8_BLOCK")
    run("dequantize", tmp_path / "fp8", tmp_path / "back")
    before, after = tensors(dense), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        assert error(after[name], before[name]) < (0.03 if "_proj" in name else 1e-9), name
