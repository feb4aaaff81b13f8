"""Checkpoints of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from support.build import tiny_llama

OTHER_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
}


def write_other(path: Path, name: str) -> None:
    """A checkpoint with one group that is not FP8, written with the compressed-tensors library."""
    fmt, weights = OTHER_FORMATS[name]
    model = tiny_llama()
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=fmt)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=fmt)
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            amax = module.weight.abs().float()
            if name == "nvfp4":
                module.weight_global_scale.data.fill_(448 * 6 / amax.max())
                amax = amax.view(*amax.shape[:-1], -1, 16).amax(-1) * module.weight_global_scale
                module.weight_scale.data.copy_((amax / 6).clamp(1e-3, 448))
            else:
                groups = amax.view(amax.shape[0], module.weight_scale.shape[1], -1).amax(-1)
                module.weight_scale.data.copy_(groups / (7.5 if name == "int4" else 127.5))
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=fmt)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
