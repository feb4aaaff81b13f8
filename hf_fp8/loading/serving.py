"""Finds layers that serving engines fuse into one, but whose parts have different schemes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Siblings that vLLM fuses into one matrix (`packed_modules_mapping` of its models). If their schemes differ, it raises
# "requires all to use the same scheme" (discussed in its pull request 11354).
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_a", "in_proj_b"),
    ("query", "key", "value"),
)


def torn(schemes: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Groups of siblings with different schemes: their names -> the scheme of each.

    schemes: name of a Linear -> its scheme, None if it is dense.
    """
    found = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for family in FUSED:
            dot = f"{parent}." if parent else ""
            held = {leaf: schemes[dot + leaf] for leaf in family if dot + leaf in schemes}
            if len(set(held.values())) > 1:
                found[dot + "/".join(held)] = [f"{leaf} {scheme or 'dense'}" for leaf, scheme in held.items()]
    return found


def describe(found: Mapping[str, Iterable[str]]) -> str:
    """A sentence for the log about the result of `torn`."""
    name, parts = next(iter(found.items()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{name}{more} are fused into one layer by serving engines such as vLLM, which refuse parts with different schemes: "
        f"{', '.join(parts)}. Put all of these layers into `ignore`, or none; merge adapters into all of them in the same way "
        "(hf_fp8.merging), or leave them quantized"
    )
