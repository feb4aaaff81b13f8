"""`hf-fp8 inspect` and `verify` of single files, as ComfyUI stores FP8 weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import run

from hf_fp8 import load_fp8_state_dict
from hf_fp8.errors import UnusedTensorError

Capture = pytest.CaptureFixture[str]
FP8 = torch.float8_e4m3fn
State = dict[str, torch.Tensor]


def scaled() -> State:
    codes = torch.linspace(-448, 448, 32 * 16).reshape(32, 16).to(FP8)
    prefix = "model.diffusion_model.blocks"
    return {
        "scaled_fp8": torch.zeros(0, dtype=FP8),
        **{f"{prefix}.{i}.attn.weight": codes.clone() for i in range(3)},
        **{f"{prefix}.{i}.attn.scale_weight": torch.tensor(0.01) for i in range(3)},
        f"{prefix}.0.attn.scale_input": torch.tensor(0.02),
        f"{prefix}.0.norm.weight": torch.ones(16),
    }


def file(path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, path / "model_fp8.safetensors", metadata=metadata)
    return path / "model_fp8.safetensors"


def test_what_they_hold(tmp_path: Path, capsys: Capture) -> None:
    path = file(tmp_path, scaled())
    run("inspect", path)
    said = capsys.readouterr().out
    assert "FP8 in ComfyUI's scaled_fp8 form: hf_fp8.load_fp8_state_dict(model, file) loads it" in said
    run("inspect", path, "--json")
    found = json.loads(capsys.readouterr().out)
    schemes = {group["scheme"]: (group["matrices"], group["targets"]) for group in found["groups"]}
    targets = ["model.diffusion_model.blocks.*.attn"]
    assert schemes == {"tensor x tensor (static)": (1, targets), "tensor weights, inputs not quantized": (2, targets)}
    assert found["error"] is None
    run("verify", path)
    said = capsys.readouterr().out
    assert "2 FP8 weights: tensor weights, inputs not quantized" in said and "nothing wrong found" in said


def test_other_forms(tmp_path: Path, capsys: Capture) -> None:
    codes = torch.ones(8, 8).to(FP8)
    layers = {"a": {"format": "float8_e4m3fn"}}
    about = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    run("inspect", file(tmp_path, {"a.weight": codes, "a.weight_scale": torch.tensor(2.0)}, about))
    assert "comfy_quant form" in capsys.readouterr().out
    run("inspect", file(tmp_path, {"a.weight": codes}))
    assert "cast to FP8, without scales" in capsys.readouterr().out
    dense = file(tmp_path, {"a.weight": codes.float()})
    run("inspect", dense)
    assert "no FP8 weights" in capsys.readouterr().out
    run("verify", dense, code=1)
    assert "has no FP8 weights" in capsys.readouterr().err


def test_diffusers_folders_are_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    run("inspect", tmp_path, code=1)
    assert "is of diffusers (_class_name 'FluxTransformer2DModel')" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scale", "weight.scale", "deq_scale", "weight_inv_scale", "weight_scaler"])
def test_scales_under_other_names(name: str, tmp_path: Path, capsys: Capture) -> None:
    path = file(tmp_path, {"a.weight": torch.ones(8, 8).to(FP8), f"a.{name}": torch.tensor(0.5)})
    run("verify", path, code=1)
    assert f"a.{name} looks like a scale of a.weight" in capsys.readouterr().err
    with pytest.raises(UnusedTensorError, match=f"a.{name}"):
        load_fp8_state_dict(torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8, bias=False)}), path, strict=False)


FAULTS = {
    "NaN scale": ("blocks.1.attn.scale_weight", torch.tensor(torch.nan), "scale_weight contains nan", False),
    "NaN code": ("blocks.1.attn.weight", torch.full((32, 16), torch.nan).to(FP8), "attn.weight has codes that are NaN", False),
    "scale without its weight": ("blocks.9.attn.scale_weight", torch.tensor(1.0), "blocks.9.attn.weight is not in", True),
    "scale of another format": ("blocks.9.attn.weight_scale", torch.tensor(1.0), "weight_scale belongs to no FP8 weight", True),
    "no scale": ("blocks.9.attn.weight", torch.ones(32, 16).to(FP8), "blocks.9.attn.scale_weight is not in the file", True),
    "scale per channel": ("blocks.1.attn.scale_weight", torch.ones(32), "scale_weight is F32 [32]", True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed(fault: str, tmp_path: Path, capsys: Capture) -> None:
    key, value, said, in_header = FAULTS[fault]
    path = file(tmp_path, scaled() | {f"model.diffusion_model.{key}": value})
    run("verify", path, code=1)
    assert said in capsys.readouterr().err
    run("inspect", path, code=1 if in_header else 0)
    assert not in_header or said in capsys.readouterr().err


def test_not_a_file_of_weights(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    for command in ("inspect", "verify"):
        run(command, tmp_path / "broken.safetensors", code=1)
        said = capsys.readouterr().err
        assert "cannot be read as safetensors" in said and "Traceback" not in said
