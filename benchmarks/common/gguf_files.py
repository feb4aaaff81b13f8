"""GGUF files with the weights of FP8 checkpoints of Llama's architecture, so that llama.cpp runs the same model.

They have no tokenizer: benchmarks give token ids. Norms stay in float32, as llama.cpp's converter leaves them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, LlamaConfig

ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def write(checkpoint: Path, linears: str, ends: str, folder: Path) -> Path:
    """The GGUF file of a checkpoint in `folder`, written if it is not there or is older.

    linears, ends: the types of Linears, and of embedding and `lm_head`: "Q8_0", "F16" or "F32".
    """
    checkpoint = checkpoint.resolve()
    config = AutoConfig.from_pretrained(checkpoint)
    check(config)
    path = folder / f"{checkpoint.name}-{zlib.crc32(str(checkpoint).encode()):08x}-{linears}-{ends}.gguf"
    newest = max(file.stat().st_mtime for file in checkpoint.iterdir())
    if not path.exists() or path.stat().st_mtime < newest:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _write(checkpoint, config, linears, ends, part)
        part.rename(path)
    return path


def check(config: Any) -> None:
    """Raises for what this does not write, though llama.cpp may run it."""
    if not isinstance(config, LlamaConfig) or config.attention_bias or config.mlp_bias:
        raise ValueError("a GGUF file is written of Llama's architecture without biases only")
    if config.rope_parameters["rope_type"] != "default":
        raise ValueError("a GGUF file is written of the default rotary embedding only")


def _write(checkpoint: Path, config: LlamaConfig, linears: str, ends: str, path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{linears}" if linears != "F32" else "ALL_F32"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in dequantized(checkpoint):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (found := names.get_name(name, try_suffixes=(".weight",))) is None:
            raise ValueError(f"GGUF has no name for {name}")
        if (part := name.split(".")[-2]) in heads:
            tensor = permuted(tensor, heads[part])
        kind = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else ends if name in ENDS else linears]
        writer.add_tensor(found, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in the order of llama.cpp, whose rotary embedding turns neighbours, not halves, of a head."""
    n, k = weight.shape
    return weight.reshape(heads, 2, n // heads // 2, k).transpose(1, 2).reshape(n, k).contiguous()


def dequantized(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight in float32, one at a time: a model of 8B does not fit into the memory of small machines in float32."""
    files = [safe_open(file, "pt") for file in sorted(checkpoint.glob("*.safetensors"))]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  it is no dict
    for name, file in where.items():
        if not name.endswith(".weight"):
            continue
        tensor = file.get_tensor(name)
        if tensor.dtype == torch.float8_e4m3fn:
            scale = where[f"{name}_scale"].get_tensor(f"{name}_scale").float()
            if scale.numel() != 1 and scale.shape != (len(tensor), 1):
                raise ValueError(f"a GGUF file is written of scales per channel or tensor only, {name} has {list(scale.shape)}")
            yield name, tensor.float() * scale
        else:
            yield name, tensor.float()
