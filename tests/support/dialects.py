"""Makes checkpoints in the dialects of other libraries, by their documented rules and with none of hf_fp8's code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

State = dict[str, torch.Tensor]
# (codes, scale as the file has it, dequantized weight in float32)
Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
E4M3 = torch.float8_e4m3fn


def per_block(weight: torch.Tensor, rows: int, cols: int, power_of_two: bool = False) -> Made:
    """One scale for each block, as in DeepSeek-V3's inference/kernel.py: amax / 448, float32; V3.1 rounds it up to 2^n."""
    n, k = weight.shape
    grid = torch.empty(-(-n // rows), -(-k // cols))
    codes, dense = torch.empty(n, k, dtype=E4M3), torch.empty(n, k)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
            scale = weight[block].float().abs().amax() / 448
            if power_of_two:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            grid[i, j] = scale
            codes[block] = (weight[block].float() / scale).clamp(-448, 448).to(E4M3)
            dense[block] = codes[block].float() * scale
    return codes, grid, dense


def per_tensor(weight: torch.Tensor) -> Made:
    """As AutoFP8's `per_tensor_quantize`, and ModelOpt's FP8: one float32 scale without dimensions."""
    scale = weight.float().abs().amax() / 448
    codes = (weight.float() / scale).clamp(-448, 448).to(E4M3)
    return codes, scale, codes.float() * scale


def per_channel(weight: torch.Tensor) -> Made:
    """As FBGEMM's `quantize_fp8_per_row`: (N, 1), float32."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).clamp(-448, 448).to(E4M3)
    return codes, scale, codes.float() * scale


def mx(weight: torch.Tensor) -> Made:
    """A power of two for each 32 columns, stored as its exponent, as the OCP Microscaling Formats specification has it."""
    groups = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % 32)).reshape(weight.shape[0], -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 8
    scale = torch.exp2(exponent).repeat_interleave(32, 1)[:, : weight.shape[1]]
    codes = (weight.float() / scale).clamp(-448, 448).to(E4M3)
    return codes, (exponent + 127).to(torch.uint8), codes.float() * scale


def e5m2(weight: torch.Tensor) -> Made:
    """One scale for each 128x128 block, for codes of the other 8-bit format."""
    _, grid, _ = per_block(weight, 128, 128)
    grid = grid * 448 / 57344
    scale = grid.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    codes = (weight.float() / scale).clamp(-57344, 57344).to(torch.float8_e5m2)
    return codes, grid, codes.float() * scale


def like(
    function: Callable[[torch.Tensor], Made], cast: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], Made]:
    """`function` with its scale as `cast` makes it: exact casts and other shapes only."""

    def made(weight: torch.Tensor) -> Made:
        codes, scale, dense = function(weight)
        return codes, cast(scale), dense

    return made


@dataclass(frozen=True)
class Variant:
    """A form in which checkpoints come.

    quantize: a weight -> its codes, scale and values. config: the `quantization_config`. scale, input: the last part of the
    names of scales; no input scales without one. cache: names of the scales of the KV cache, after that of the attention.
    file: the name of another file for the config than config.json."""

    quantize: Callable[[torch.Tensor], Made]
    config: Mapping[str, Any]
    scale: str = "weight_scale"
    input: str = ""
    cache: tuple[str, ...] = ()
    file: str = ""
    by_default: bool = True
    ignore: str = field(default="modules_to_not_convert")


def block(rows: int, cols: int, **rest: Any) -> Callable[[torch.Tensor], Made]:
    return lambda weight: per_block(weight, rows, cols, **rest)


def llava() -> PreTrainedModel:
    """A vision-language model whose files have other names than its modules: `language_model.model.layers`, ..."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=127, dtype="bfloat16", tie_word_embeddings=False
    )
    return LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_MODELOPT = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.33.0"}}
_IN_FILE = {"producer": {"name": "modelopt", "version": "0.19.0"}}
_STATIC = {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"}}
_GROUP = {"group_0": {**_STATIC, "weights": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}}
_KV = ("k_proj.k_scale", "v_proj.v_scale")
_MX = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
_FOUR = like(block(128, 128), lambda scale: scale[:, None, :, None].contiguous())

VARIANTS = {
    "deepseek": Variant(block(128, 128), _FP8, "weight_scale_inv", by_default=False),
    "deepseek-2^n": Variant(
        block(128, 128, power_of_two=True), _FP8 | {"scale_fmt": "ue8m0"}, "weight_scale_inv", by_default=False
    ),
    "qwen": Variant(
        like(block(128, 128, power_of_two=True), lambda scale: scale.to(torch.bfloat16)), _FP8 | {"modules_to_not_convert": []},
        "weight_scale_inv", by_default=False,
    ),
    "deepseek-v4": Variant(block(128, 128, power_of_two=True), _FP8, "scale", by_default=False),
    "mistral's own names": Variant(
        per_tensor, _FP8 | {"weight_block_size": None, "activation_scheme": "static"}, "qscale_weight", "qscale_act",
        by_default=False,
    ),
    "deepseek, exponents": Variant(
        like(block(128, 128, power_of_two=True), lambda scale: scale.to(torch.float8_e8m0fnu)), _FP8 | {"scale_fmt": "ue8m0"},
        "weight_scale_inv", by_default=False,
    ),
    "E5M2": Variant(e5m2, _FP8 | {"fmt": "e5m2"}, "weight_scale_inv", by_default=False),
    "mxfp8": Variant(mx, _MX, "weight_scale_inv", by_default=False),
    "mxfp8, exponents": Variant(
        like(mx, lambda scale: scale.view(torch.float8_e8m0fnu)), {"quant_method": "mxfp8"}, "weight_scale_inv",
        by_default=False,
    ),
    "modelopt, mxfp8": Variant(mx, {**_MODELOPT, "quant_algo": "MXFP8", "ignore": []}, ignore="ignore"),
    "blocks of 32x64": Variant(block(32, 64), _FP8 | {"weight_block_size": [32, 64]}, "weight_scale_inv", by_default=False),
    "mistral": Variant(
        per_tensor, _FP8 | {"weight_block_size": None, "activation_scheme": "static"}, "weight_scale_inv", "activation_scale",
        by_default=False,
    ),
    "fbgemm": Variant(
        per_channel, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, by_default=False,
    ),
    "autofp8": Variant(
        per_tensor, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []}, input="input_scale",
        cache=("kv_scale",), ignore="ignored_layers",
    ),
    "autofp8, old names": Variant(
        like(per_tensor, lambda scale: scale.reshape(1)), {"quant_method": "fp8", "activation_scheme": "static"},
        input="act_scale", ignore="ignored_layers",
    ),
    "autofp8, dynamic": Variant(per_tensor, {"quant_method": "fp8", "activation_scheme": "dynamic"}, ignore="ignored_layers"),
    "channels of which nothing is said": Variant(
        per_channel, {"quant_method": "fp8", "activation_scheme": "dynamic"}, ignore="ignored_layers"
    ),
    "blocks of which nothing is said": Variant(
        block(128, 128), {"quant_method": "fp8", "activation_scheme": "dynamic"}, "weight_scale_inv", ignore="ignored_layers"
    ),
    "modelopt": Variant(
        per_tensor, {**_MODELOPT, "quant_algo": "FP8", "config_groups": _GROUP, "ignore": []}, input="input_scale", cache=_KV,
        ignore="ignore",
    ),
    "modelopt, in its own file": Variant(
        per_tensor, {**_IN_FILE, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": []}},
        input="input_scale", cache=_KV, file="hf_quant_config.json", ignore="exclude_modules",
    ),
    "modelopt, per channel": Variant(
        like(per_channel, lambda scale: scale.reshape(-1)), {**_MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore":
        []}, ignore="ignore",
    ),
    "modelopt, blocks": Variant(_FOUR, {**_MODELOPT, "quant_algo": "fp8_pb_wo", "ignore": []}, ignore="ignore"),
}  # fmt: skip


def write_in(
    name: str | Variant,
    model: PreTrainedModel,
    path: Path,
    quantized: Callable[[str], bool],
    edit: Callable[[State], State] = lambda state: state,
    dense: tuple[str, ...] | None = None,
    config_edit: Callable[[dict[str, Any]], Any] = lambda config: None,
) -> tuple[State, State]:
    """Save `model` in a variant. Returns (tensors written, tensors of the dequantized model). dense: the skip list of its
    config; by default the output embedding, if the variant has such a list."""
    variant = VARIANTS[name] if isinstance(name, str) else name
    model.save_pretrained(path)
    values = load_file(path / "model.safetensors")
    written: State = {}
    for key, tensor in list(values.items()):
        if not quantized(key) or tensor.ndim != 2:
            written[key] = tensor
            continue
        stem = key.removesuffix("weight")
        written[key], written[stem + variant.scale], values[key] = variant.quantize(tensor)
        if variant.input:
            shape = written[stem + variant.scale].shape
            written[stem + variant.input] = torch.tensor(3.0 / 448).reshape(shape)
        if key.endswith("k_proj.weight"):
            attention = key.removesuffix("k_proj.weight")
            written.update({attention + leaf: torch.tensor(0.02) for leaf in variant.cache})
    config = json.loads((path / "config.json").read_text())
    about = json.loads(json.dumps(variant.config))
    place = about.get("quantization", about)
    if dense is not None or variant.ignore in place:
        place[variant.ignore] = ["lm_head"] if dense is None else list(dense)
    config_edit(about)
    if variant.file:
        (path / variant.file).write_text(json.dumps(about, indent=4))
    else:
        config["quantization_config"] = about
    (path / "config.json").write_text(json.dumps(config))
    save_file(edit(written), path / "model.safetensors", metadata={"format": "pt"})
    return edit(written), values
