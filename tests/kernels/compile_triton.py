"""Compile every Triton kernel of hf_fp8 to machine code for several GPUs. No GPU is needed; run without TRITON_INTERPRET.

python tests/kernels/compile_triton.py takes all tiles for all of them, ten minutes; with "quick", two GPUs and one tile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_fp8.formats.code_types import INT4, INT8
from hf_fp8.formats.scheme import Granularity, TensorScheme
from hf_fp8.kernels.triton import grouped as triton_grouped
from hf_fp8.kernels.triton import int8_epilogue as triton_epilogue
from hf_fp8.kernels.triton import quantize as triton_quantize
from hf_fp8.kernels.triton import scaled_mm as triton_mm
from hf_fp8.kernels.triton import weight_only as triton_weight_only

# What an SM has of shared memory for a program, in bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TYPES = {"scales": "*fp32", "static": "*fp32", "x_scales": "*fp32", "parts": "*fp32", "sums": "*i32", "zeros": "*i32"}
TYPES |= {"rows": "*i64", "slots": "*i64", "experts": "*i64", "offsets": "*i32"}
TYPES |= {"kept": "*fp32", "outliers": "*fp32", "beside": "*fp32"}
FLOATS = ("code_max", "min_scale", "factor")
FLOAT_POINTERS = {tl.bfloat16: "*bf16", tl.float32: "*fp32"}
POINTERS = ("x", "q", "w", "out", "bias", "w_scales")


def compile_for(capability: int, kernel: Any, codes: str, constants: dict[str, Any], **options: int) -> None:
    names = kernel.arg_names
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in TYPES:
            kind = TYPES[name]
        elif name in POINTERS:
            is_codes = name in ("q", "w") or (name == "x" and constants.get("QUANTIZED", False))
            kind = codes if is_codes else FLOAT_POINTERS[constants.get("DTYPE", tl.bfloat16)]
        else:
            kind = "fp32" if name in FLOATS else "i32"
        signature[name] = kind
        # As a launch with aligned tensors and sizes has it: without this nothing is loaded asynchronously.
        if kind.startswith("*") or name in ("K", "N", "width") or name.startswith("stride"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"], kernel
    assert compiled.metadata.shared <= SHARED[capability], (kernel, constants, compiled.metadata.shared)


def compile_grouped(capability: int, codes: str, tiles: Any, quantized: bool, kind: Any) -> None:
    for number, (_, m, n, k, warps, stages) in enumerate(tiles):
        tile = {
            "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_E": 256, "GROUP": triton_mm.GROUP_M,
            "HAS_ROWS": True, "SORTED": number > 0, "stride_xk": 1,
            "QUANTIZED": quantized, "BITS": codes == "*i8", "DTYPE": kind, "PACKED": 0, "HAS_ZEROS": False,
        }  # fmt: skip
        for cols in (0, 128):
            scales = {"X_COLS": cols if quantized else 0, "W_COLS": cols, "HAS_SLOTS": cols > 0}
            compile_for(capability, triton_grouped._grouped, codes, {**tile, **scales}, num_warps=warps, num_stages=stages)


def compile_packed(capability: int, dtype: torch.dtype, kind: Any, quick: bool) -> None:
    """Both kernels that take packed codes: all widths and groups with all tiles, or if `quick` two of them with one tile."""
    entries = triton_weight_only.TILES[:1] if quick else triton_weight_only.TILES
    for bits, cols in ((4, 128), (8, -1)) if quick else ((4, 128), (4, 32), (4, 16), (4, -1), (8, 128), (8, -1)):
        weight = TensorScheme(Granularity(1, cols), dtype=INT4 if bits == 4 else INT8, packed=True)
        for number, (rows, *_) in enumerate(entries):
            m, n, k, warps, stages = triton_weight_only.tile_for(rows, dtype, weight)
            both = {
                "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BITS": False, "PACKED": bits, "HAS_ZEROS": cols > 0, "DTYPE": kind,
                "stride_xk": 1,
            }  # fmt: skip
            of_linears = {"SCALE_N": 1, "SCALE_K": max(cols, 0), "SPLIT": number == 0, "HAS_BIAS": True, "stride_sk": 1}
            of_stacks = {
                "BLOCK_E": 256, "GROUP": triton_mm.GROUP_M, "HAS_ROWS": True, "HAS_SLOTS": True, "SORTED": number > 0,
                "QUANTIZED": False, "X_COLS": 0, "W_COLS": max(cols, 0), "stride_ck": 1,
            }  # fmt: skip
            options = {"num_warps": warps, "num_stages": stages}
            compile_for(capability, triton_weight_only._weight_only, "*i32", {**both, **of_linears}, **options)
            compile_for(capability, triton_grouped._grouped, "*i32", {**both, **of_stacks}, **options)


def main(quick: bool) -> None:
    some = slice(None, None, 100) if quick else slice(None)
    for capability in (80, 90) if quick else SHARED:
        kinds = ["*i8"] + (["*fp8e4nv"] if capability >= 89 else [])
        for codes in kinds:
            is_int8 = {"IS_INT8": codes == "*i8"}
            rows = {"IS_STATIC": False, "HAS_KEPT": False, "stride_k": 1, **is_int8}
            compile_for(capability, triton_quantize._rows, codes, {**rows, "ONE": True, "BLOCK": 16384}, num_warps=8)
            compile_for(capability, triton_quantize._rows, codes, {**rows, "ONE": False, "BLOCK": 8192}, num_warps=8)
            compile_for(capability, triton_quantize._rows, codes, {**rows, "HAS_KEPT": True, "ONE": True, "BLOCK": 4096})
            groups = {"SIZE": 128, "WIDTH": 128, "GROUPS": 16, "stride_k": 1, **is_int8}
            compile_for(capability, triton_quantize._groups, codes, groups)
            for _, m, n, k, warps, stages in triton_mm.TILES[some]:
                tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": triton_mm.GROUP_M, "HAS_BIAS": True, **is_int8}
                for scales in ({"X_COLS": 0, "W_ROWS": 1, "W_COLS": 0}, {"X_COLS": 128, "W_ROWS": 128, "W_COLS": 128}):
                    compile_for(capability, triton_mm._scaled_mm, codes, {**tile, **scales}, num_warps=warps, num_stages=stages)
        for dtype, kind in ((torch.bfloat16, tl.bfloat16), (torch.float32, tl.float32)):
            tiles = [triton_weight_only.tile(entry[0], dtype) for entry in triton_weight_only.TILES[some]]
            for codes, bits in [(name, False) for name in kinds] + [("*i8", True)]:
                for _, m, n, k, warps, stages in tiles:
                    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BITS": bits, "DTYPE": kind, "HAS_BIAS": True}
                    tile |= {"PACKED": 0, "HAS_ZEROS": False}
                    fixed = {"SCALE_N": 1, "SCALE_K": 0, "SPLIT": False, "stride_xk": 1, "stride_sn": 1, "stride_sk": 1}
                    compile_for(
                        capability,
                        triton_weight_only._weight_only,
                        codes,
                        {**tile, **fixed},
                        num_warps=warps,
                        num_stages=stages,
                    )
            compile_grouped(capability, kinds[-1], tiles, quantized=False, kind=kind)
            compile_packed(capability, dtype, kind, quick)
        if capability >= 89:
            compile_grouped(capability, "*fp8e4nv", triton_mm.TILES[some], quantized=True, kind=tl.bfloat16)
        compile_for(capability, triton_weight_only._add_up, "*i8", {"SPLITS": 4, "HAS_BIAS": True, "BLOCK": 1024})
        for columns in (0, 16, 64):
            tile = {"BLOCK_M": triton_epilogue.BLOCK_M, "BLOCK_N": triton_epilogue.BLOCK_N, "BLOCK_R": columns}
            compile_for(capability, triton_epilogue._scale_sums, "*i8", {"HAS_BIAS": True, "DTYPE": tl.bfloat16, **tile})
    print("all compiled")


if __name__ == "__main__":
    main(sys.argv[1:] == ["quick"])
