"""Plain pickles of FP8 tensors that can be read again: of models, of state dicts, of what `gather_object` sends."""

from __future__ import annotations

import copyreg
import pickle
from typing import Any

import torch

from .scheme import FP8


def install() -> None:
    """Mend how Python's `pickle` writes FP8 tensors, if this torch does not do it right by itself.

    torch 2.13 pickles tensors of its newer dtypes (float8, uint16, ...) by their untyped storage, in a form that nothing
    reads: `pickle.dumps` succeeds, `pickle.loads` raises AttributeError, whoever calls it. `torch.save` and `multiprocessing`
    have ways of their own, which this leaves alone. What is written with it is read without it, too.
    """
    try:
        pickle.loads(pickle.dumps(torch.empty(1, dtype=FP8)))
    except AttributeError:
        copyreg.pickle(torch.UntypedStorage, _as_bytes)


def _as_bytes(storage: torch.UntypedStorage) -> Any:
    """What torch writes of a tensor of bytes; its own function that rebuilds a tensor takes that for any dtype."""
    of_bytes: Any = torch.storage.TypedStorage
    return of_bytes(wrap_storage=storage, dtype=torch.uint8, _internal=True).__reduce__()
