"""Multiplies with the library of the hf-fp8 that is installed, on each instruction set of this processor; needs no torch."""

from __future__ import annotations

import ctypes
import importlib.util
from array import array
from itertools import count
from pathlib import Path
from struct import pack

ONE, TWO, MINUS_ONE = 0x38, 0x40, 0xB8  # in E4M3
N, K = 33, 70

spec = importlib.util.find_spec("hf_fp8")  # the package itself would import torch
assert spec is not None and spec.submodule_search_locations
library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0], "formats", "_native.so")))
library.hf_fp8_name.restype = ctypes.c_char_p

values = {ONE: 1.0, TWO: 2.0, MINUS_ONE: -1.0}
codes = array("B", ([ONE, TWO, MINUS_ONE, TWO, ONE] * (N * K))[: N * K])
scales = array("f", [0.5 + row for row in range(N)])
for index in count():
    if (name := library.hf_fp8_name(ctypes.c_int64(index))) is None:
        break
    if library.hf_fp8_use(ctypes.c_int64(index)):
        print(f"{name.decode()}: this processor does not have it")
        continue
    for m in (1, 5, 40):
        x = array("f", [i % 7 - 3 for i in range(m * K)])
        out = array("f", bytes(4 * m * N))
        c, s, i, o = (numbers.buffer_info()[0] for numbers in (codes, scales, x, out))
        # Weights, and Product after it, of common.h.
        weights = (c, s, 0, 0, 1, N, K, K, 0, 1, 1, K, 0)
        assert library.hf_fp8_multiply(pack("=28q", *weights, i, 0, K, m, 0, 0, 0, 1, m, 0, 0, o, 0, 0, 1)) == 0
        wanted = [
            scales[row] * sum(x[r * K + d] * values[codes[row * K + d]] for d in range(K)) for r in range(m) for row in range(N)
        ]
        assert out.tolist() == wanted, (name, m)
    print(f"{name.decode()}: right")
assert index > 1
