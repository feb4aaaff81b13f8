"""Through the host's doors: ways of calling, devices, files, spellings."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.build import KEEP, OFFLOAD, STATIC_TENSOR, differing, error, load, logits, tensors, tiny_llama, write
from support.checkpoints import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM
from transformers.utils import logging

import hf_fp8
from hf_fp8 import FP8Config, QuantizedLinear
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import TENSOR
from hf_fp8.integrations import placement
from hf_fp8.integrations.placement import compute_device

# What is passed as `quantization_config` -> whether weights stay in FP8 where a kernel for them is.
WAYS: dict[str, tuple[Any, bool]] = {
    "nothing": (None, True),
    "FP8Config": (FP8Config(), True),
    "dequantize": (FP8Config(dequantize=True), False),
    "stock": (CompressedTensorsConfig(), True),
    "stock, dequantize": (CompressedTensorsConfig(dequantize=True), False),
    "stock, run_compressed": (CompressedTensorsConfig(run_compressed=True), True),
    "stock, not run_compressed": (CompressedTensorsConfig(run_compressed=False), False),
    "stock, optimized": (CompressedTensorsConfig(use_optimized_inference=True), True),
    "stock, both": (CompressedTensorsConfig(use_optimized_inference=True, dequantize=True), False),
    "dict": ({"quant_method": "compressed-tensors"}, True),
    "dict, dequantize": ({"quant_method": "compressed-tensors", "dequantize": True}, False),
    "dict, not run_compressed": ({"run_compressed": False}, False),
    "our dict": ({"quant_method": "hf_fp8", "experts": "auto"}, True),
    "dict of two": ({"dequantize": True, "use_optimized_inference": True}, False),
}


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_calling(way: str, fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU dequantizes whatever it is told; a device with FP8 kernels does what it is told."""
    asked, kept = WAYS[way]
    options = {} if asked is None else {"quantization_config": asked}
    found = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32, **options)
    plain = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32)
    assert torch.equal(logits(found), logits(plain))
    assert not any(isinstance(module, QuantizedLinear) for module in found.modules())
    assert not hasattr(found.config, "quantization_config")
    monkeypatch.setattr(placement, "why_not_kept", lambda device, dtype: None)
    there = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32, **options)
    assert sum(isinstance(module, QuantizedLinear) for module in there.modules()) == (14 if kept else 0)
    assert hasattr(there.config, "quantization_config") is kept


@pytest.mark.parametrize("way", [KEEP, {"backend": "weight_only"}, {"quant_method": "hf_fp8", "backend": "weight_only"}])
def test_ways_of_keeping(way: Any, fp8: Path) -> None:
    model = load(fp8, way)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert model.config.quantization_config.backend == "weight_only"
    assert "backend" not in json.dumps(model.config.to_dict()["quantization_config"])


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ({"bits": 8}, "'bits'"),
        ({"quant_method": "gptq"}, "'gptq'"),
        (object(), "object"),
    ],
)
def test_other_configs_are_refused(way: Any, words: str, fp8: Path) -> None:
    with pytest.raises(hf_fp8.errors.ConfigError, match=words):
        load(fp8, way)


def test_the_config_of_a_loaded_model_loads_again(fp8: Path) -> None:
    first = load(fp8)
    again = LlamaForCausalLM.from_pretrained(fp8, config=first.config, dtype=torch.float32)
    assert torch.equal(logits(again), logits(first))
    assert isinstance(AutoConfig.from_pretrained(fp8).quantization_config, dict)


@pytest.mark.usefixtures("no_native")
def test_what_happened_is_said_once(fp8: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.enable_propagation()
    try:
        load(fp8, FP8Config())
        assert caplog.text.count("dequantized to torch.float32") == 1
        caplog.clear()
        load(fp8, FP8Config(dequantize=True))
        load(fp8)
        assert "hf_fp8" not in caplog.text
    finally:
        logging.disable_propagation()


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("backend", ["auto", "weight_only"])
def test_cache_scales_travel(backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint("llama-static-kv", tmp_path)
    logging.enable_propagation()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(backend=backend))
    finally:
        logging.disable_propagation()
    assert caplog.text.count("not applied") == (backend != "auto")
    assert "UNEXPECTED" not in caplog.text
    model.save_pretrained(tmp_path / "saved")
    saved, read = tensors(tmp_path / "saved"), tensors(path)
    scales = {name for name in read if name.endswith(("k_scale", "v_scale"))}
    assert scales and (scales <= set(saved)) == (backend != "auto")
    assert not scales & set(differing(saved, read)) or backend == "auto"


@pytest.mark.parametrize("head", ["dense", "fp8"])
@pytest.mark.parametrize("config", [FP8Config(), KEEP], ids=["auto", "weight_only"])
def test_no_dtype_in_the_config(config: FP8Config, head: str, tmp_path: Path) -> None:
    """The first tensor of the files may be FP8: no dtype for a model."""
    quantized = (lambda n: n.endswith(("_proj.weight", "lm_head.weight"))) if head == "fp8" else None
    options = {"quantized": quantized, "ignore": []} if quantized else {}
    write(tiny_llama(), tmp_path, config_edit=lambda c: c.pop("dtype"), **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.dtype == torch.bfloat16
    assert error(logits(model), logits(load(tmp_path, FP8Config(dequantize=True)))) < 0.03


@pytest.mark.parametrize(
    "config", [FP8Config(), KEEP, FP8Config(backend="scaled_mm")], ids=["auto", "weight_only", "scaled_mm"]
)
def test_disk_offload(config: FP8Config, fp8: Path, tmp_path: Path) -> None:
    plain = load(fp8, config)
    model = load(fp8, config, device_map=OFFLOAD, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(plain))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    model.save_pretrained(tmp_path / "saved")
    plain.save_pretrained(tmp_path / "plain")
    assert differing(tensors(tmp_path / "saved"), tensors(tmp_path / "plain")) == []


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}])
@pytest.mark.parametrize("config", [FP8Config(), KEEP], ids=["auto", "weight_only"])
def test_device_maps(device_map: Any, config: FP8Config, fp8: Path) -> None:
    assert torch.equal(logits(load(fp8, config, device_map=device_map)), logits(load(fp8, config)))


def test_where_a_device_map_computes() -> None:
    assert compute_device({"": "cpu"}) == torch.device("cpu")
    assert compute_device({"a": "cpu", "b": "disk"}) == torch.device("cpu")
    assert compute_device({"a": "cpu", "b": "cuda:1"}) == torch.device("cuda:1")
    assert compute_device("cuda") == torch.device("cuda")
    assert compute_device(torch.device("xpu", 0)) == torch.device("xpu:0")


def test_shards(fp8: Path, tmp_path: Path) -> None:
    """A weight and its scale in different files, as the host splits them."""
    model = load(fp8, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    weights = [name for name in index if name.endswith("_scale")]
    assert any(index[name] != index[name.removesuffix("_scale")] for name in weights)
    assert differing(tensors(tmp_path / "shards"), tensors(fp8)) == []
    assert torch.equal(logits(load(tmp_path / "shards", dtype=torch.bfloat16)), logits(model))


def test_a_missing_shard(fp8: Path, tmp_path: Path) -> None:
    load(fp8, dtype=torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="9KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    lost = written["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    written["weight_map"] = {name: file for name, file in written["weight_map"].items() if file != lost}
    index.write_text(json.dumps(written))
    with pytest.raises(hf_fp8.errors.CheckpointError, match=lost):
        load(tmp_path / "shards")
    # The same under names that no series gives away.
    for file in (tmp_path / "shards").glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace("-of-", "_")))
    written["weight_map"] = {name: file.replace("-of-", "_") for name, file in written["weight_map"].items()}
    index.write_text(json.dumps(written))
    with pytest.raises(hf_fp8.errors.CheckpointError, match=r"layers\.1"):
        load(tmp_path / "shards")


def test_offline_cache(fp8: Path, tmp_path: Path) -> None:
    """The layout that huggingface_hub leaves: blobs, and links to them in a snapshot."""
    cache = tmp_path / "hub"
    repo, commit = cache / "models--someone--tiny", "0" * 40
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(fp8.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        os.symlink(repo / "blobs" / str(number), snapshot / file.name)
    model = AutoModelForCausalLM.from_pretrained(
        "someone/tiny", cache_dir=cache, local_files_only=True, quantization_config=KEEP, dtype=torch.float32
    )
    assert torch.equal(logits(model), logits(load(fp8)))


@pytest.mark.parametrize("config", [FP8Config(), KEEP], ids=["auto", "weight_only"])
def test_pickled_checkpoint(config: FP8Config, fp8: Path, tmp_path: Path) -> None:
    wanted = logits(load(fp8, config))
    torch.save(load_file(fp8 / "model.safetensors"), fp8 / "pytorch_model.bin")
    (fp8 / "model.safetensors").unlink()
    assert torch.equal(logits(load(fp8, config)), wanted)


def test_key_mapping(fp8: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    wanted = logits(load(fp8))
    state = {name.replace("model.layers", "trunk.blocks"): t for name, t in load_file(fp8 / "model.safetensors").items()}
    save_file(state, fp8 / "model.safetensors", metadata={"format": "pt"})
    model = load(fp8, key_mapping={r"^trunk\.blocks": "model.layers"})
    assert torch.equal(logits(model), wanted)


SPELLINGS: dict[str, Any] = {
    "weight_scale_inv": {"edit": lambda s: {k.replace("weight_scale", "weight_scale_inv"): v for k, v in s.items()}},
    "flat": {"scale_shape": lambda s: s.reshape(-1)},
    "scalar": {"scale_shape": lambda s: s.reshape(()), "weight": TENSOR, "inputs": STATIC_TENSOR},
    "act_scale": {
        "edit": lambda s: {k.replace("input_scale", "act_scale"): v for k, v in s.items()}, "weight": TENSOR,
        "inputs": STATIC_TENSOR,
    },
    "fp16": {"scale_dtype": torch.float16},
    "f32": {"scale_dtype": torch.float32},
    "zero zero points": {
        "edit": lambda s: s | {"model.layers.0.mlp.up_proj.weight_zero_point": torch.zeros(96, 1).to(FP8)},
    },
    "frozen": {"config_edit": lambda c: c["quantization_config"].update(quantization_status="frozen")},
    "no status": {"config_edit": lambda c: c["quantization_config"].pop("quantization_status")},
    "compression_config": {"config_edit": lambda c: c.update(compression_config=c.pop("quantization_config"))},
    "no method": {"config_edit": lambda c: c.update(compression_config=_without(c.pop("quantization_config"), "quant_method"))},
    "preset": {"config_edit": lambda c: c["quantization_config"].update(config_groups={"FP8_DYNAMIC": ["Linear"]})},
    "ignore by a shorter name": {"quantized": lambda n: n.endswith("up_proj.weight"), "targets": ["re:.*mlp.*"],
                                 "ignore": ["lm_head", "gate_proj", "re:down_proj"]},
}  # fmt: skip


def _without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != key}


@pytest.mark.usefixtures("no_native")
@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("backend", ["auto", "weight_only", "scaled_mm"])
def test_spellings(name: str, backend: str, tmp_path: Path) -> None:
    written, dense = write(tiny_llama(), tmp_path / "fp8", **SPELLINGS[name])
    model = load(tmp_path / "fp8", FP8Config(backend=backend), dtype=torch.bfloat16)
    proj = model.model.layers[1].mlp.up_proj
    found = proj.dequantized_weight() if backend != "auto" else proj.weight.float()
    wanted = dense["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(found, wanted if backend != "auto" else wanted.bfloat16().float())
    if backend == "auto":
        return
    model.save_pretrained(tmp_path / "saved")
    saved = tensors(tmp_path / "saved")
    assert differing(saved, written) == []
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quantization_status"] == "compressed"
    again = load(tmp_path / "saved", FP8Config(backend=backend), dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "scale" in name])
def test_spellings_survive_a_change_of_class(spelling: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    written, _ = write(tiny_llama(), tmp_path / "causal", **SPELLINGS[spelling])
    options = {"quantization_config": KEEP, "dtype": torch.bfloat16}
    AutoModel.from_pretrained(tmp_path / "causal", **options).save_pretrained(tmp_path / "base")
    body = {k.removeprefix("model."): v for k, v in written.items() if k.startswith("model.")}
    assert differing(body, tensors(tmp_path / "base")) == []
    LlamaForCausalLM.from_pretrained(tmp_path / "base", **options).save_pretrained(tmp_path / "again")
    again = {k: v for k, v in tensors(tmp_path / "again").items() if k.startswith("model.")}
    assert differing({k: v for k, v in written.items() if k.startswith("model.")}, again) == []


def test_groups_that_others_speak_of_more_precisely(tmp_path: Path) -> None:
    def two(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["all"] = {**groups["group_0"], "targets": ["Linear"], "input_activations": None}

    write(tiny_llama(), tmp_path, targets=["re:.*_proj"], config_edit=two)
    model = load(tmp_path)
    assert {m.scheme.describe() for m in model.modules() if isinstance(m, QuantizedLinear)} == {"channel x token (dynamic)"}
