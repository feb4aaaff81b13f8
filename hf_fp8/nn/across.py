"""Dynamic input scales where each process has a part of the columns of an input: the amax is combined over the processes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..formats.cuts import Cut
from ..formats.scheme import Granularity
from ..kernels.base import Reduce


class Across(NamedTuple):
    """The processes that hold the columns of an input, and where the groups of columns of this process belong.

    group: the name of the process group. Group j of this process lies in group ``(first + j) // each`` of all `total`; one
    group for the whole row has (0, 1, 1).
    """

    group: str
    first: int = 0
    each: int = 1
    total: int = 1

    @property
    def text(self) -> str:
        """For arguments of ops."""
        return f"{self.first},{self.each},{self.total},{self.group}"

    def reduce(self, amax: torch.Tensor) -> torch.Tensor:
        """The largest of all processes. NaN counts as infinite, as the largest of NaN and a number depends on the backend."""
        from torch.distributed import ReduceOp, all_reduce
        from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

        found = torch.nan_to_num(amax if amax.dtype == torch.float64 else amax.float(), nan=torch.inf, posinf=torch.inf)
        places = None
        if (self.first, self.each, self.total) != (0, 1, 1):
            places = (self.first + torch.arange(found.shape[-1], device=found.device)) // self.each
            whole = found.new_zeros((*found.shape[:-1], self.total))
            found = whole.scatter_reduce_(-1, places.expand_as(found), found, "amax")
        all_reduce(found, ReduceOp.MAX, group=_resolve_process_group(self.group))  # type: ignore[arg-type]
        return found if places is None else found.index_select(-1, places)


def across(cut: Cut, given: Granularity, group: str) -> str:
    """The `Across.text` for inputs of granularity `given` whose columns are cut; "" if no group of columns is."""
    if cut.of == 1 or cut.fits(given.cols):
        return ""
    if given.cols == -1:
        return Across(group).text
    unit = cut.unit(given.cols)
    first = cut.index * cut.chunk // unit
    return Across(group, first, given.cols // unit, -(-cut.size // given.cols)).text


@lru_cache(maxsize=4096)
def reducer(text: str) -> Reduce | None:
    """The function for an `Across.text`; None for ""."""
    if not text:
        return None
    first, each, total, group = text.split(",", 3)
    return Across(group, int(first), int(each), int(total)).reduce
