"""Layers that serving engines run as one, of which parts are stored in another way than the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Siblings that vLLM makes one matrix of (`packed_modules_mapping` of its models). Where these are not all in one scheme it
# raises "requires all to use the same scheme" (its pull request 11354 discusses that).
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
    """The groups of siblings that are not all in one scheme: their names -> what each is.

    schemes: name of a Linear -> how it is stored, None if it is dense.
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
    """A sentence for the log."""
    name, parts = next(iter(found.items()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{name}{more} are run as one layer by serving engines such as vLLM, which refuses parts in different schemes: "
        f"{', '.join(parts)}. Put all of such layers into `ignore` or none; merge adapters into all of them in one way "
        "(hf_fp8.merging), or leave them quantized"
    )
