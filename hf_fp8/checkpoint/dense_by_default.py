"""Modules that stay dense unless a target matches nothing else: output embeddings, and the routers of MoE models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .config_groups import Group, match

# Names in MoE models of the Linear that chooses experts, or of the gate of the shared expert.
ROUTER = re.compile(r"(^|\.)(gate|router|[a-z_]*_router|router\.(layer|classifier|proj)|gate\.wg|shared_expert_gate)$")


def is_dense_by_default(names: Iterable[str], is_head: bool) -> bool:
    """Whether it is such a module. is_head: whether it is the output embedding."""
    return is_head or is_router(names)


def is_router(names: Iterable[str]) -> bool:
    """Whether any of the names of a module is that of a router."""
    return any(ROUTER.search(name) for name in names)


def explicit_targets(groups: Iterable[Group], usual: Sequence[tuple[str, ...]]) -> list[str]:
    """The targets that match only such modules, and so quantize them. usual: names of all other Linears."""
    targets = [target for group in groups for target in group.targets]
    return [target for target in targets if not any(match(called, ("Linear",), [target]) for called in usual)]
