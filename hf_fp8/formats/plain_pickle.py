"""Fix for plain pickles of FP8 tensors, as in models, state dicts and `gather_object`."""

from __future__ import annotations

import copyreg
import pickle
from typing import Any

import torch

from .code_types import FP8


def install() -> None:
    """Register a reducer for Python's `pickle` of FP8 tensors, if this version of torch pickles them wrongly.

    torch 2.13 pickles tensors of its newer dtypes (float8, uint16, ...) by their untyped storage in a form that cannot be
    read: `pickle.dumps` succeeds, `pickle.loads` always raises AttributeError. `torch.save` and `multiprocessing` use other
    code, which is not changed. Pickles written with the fix can also be read without it.
    """
    try:
        pickle.loads(pickle.dumps(torch.empty(1, dtype=FP8)))
    except AttributeError:
        copyreg.pickle(torch.UntypedStorage, _as_bytes)


def _as_bytes(storage: torch.UntypedStorage) -> Any:
    """Pickle the storage as one of uint8; torch's function that rebuilds a tensor accepts it for any dtype."""
    of_bytes: Any = torch.storage.TypedStorage
    return of_bytes(wrap_storage=storage, dtype=torch.uint8, _internal=True).__reduce__()
