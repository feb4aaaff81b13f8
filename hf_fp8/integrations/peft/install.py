"""Patches PEFT for quantized layers: adapters are created and merged on a float copy of one layer at a time.

PEFT reads and writes `base_layer.weight`, which here holds codes (stored 8-bit values). So while PEFT creates or merges an
adapter, the layer is replaced by a float copy. Forwards and gradients call the layer, and need no change, except for DoRA,
which reads the weight, and for adapters on expert stacks, which QuantizedExperts applies itself.

Only a few functions of PEFT are replaced for the whole process: those that are the first to get quantized layers. They bind
methods to the tuners and adapters on these layers (`create.inject_adapter`, `create._keep`); all others are unchanged.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from packaging import version

from ..import_hook import after_import, cancel
from ..patches import wrap, wrap_everywhere
from .create import inject_adapter, refuse_all
from .prepare import prepare, reduce_intruders, update_copy, with_float_heads

# Also the oldest that transformers 5.23 supports.
OLDEST_PEFT = "0.20.0"
# What is replaced or called here. A version of PEFT without one of them is not supported.
RELIED_ON = (
    "peft.tuners.tuners_utils:BaseTuner.inject_adapter",
    "peft.tuners.tuners_utils:BaseTuner._create_and_replace",
    "peft.tuners.tuners_utils:BaseTuner.merge_adapter",
    "peft.tuners.tuners_utils:BaseTuner.unmerge_adapter",
    "peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge",
    "peft.tuners.tuners_utils:BaseTunerLayer.merge",
    "peft.tuners.tuners_utils:BaseTunerLayer.unmerge",
    "peft.tuners.tuners_utils:check_adapters_to_merge",
    "peft.tuners.lora.layer:ParamWrapper._activate_lora",
    "peft.tuners.lora.layer:ParamWrapper._move_adapter_to_device_of_base_layer",
    "peft.tuners.lora.layer:ParamWrapper.unload_and_optionally_merge_module",
    "peft.tuners.lora.dora:DoraLinearLayer.forward",
    "peft.utils.integrations:skip_init_on_device",
    "peft.utils.other:ModulesToSaveWrapper.update",
    "peft.utils.other:prepare_model_for_kbit_training",
    "peft.utils.save_and_load:get_peft_model_state_dict",
)


def install() -> None:
    """Patch PEFT: now if it is imported, else as soon as it is. Harmless when repeated."""
    after_import("peft", _teach)


def uninstall() -> None:
    """Do not patch a PEFT that is imported from now on. `patches.restore` restores one that is imported already."""
    cancel("peft")


def _teach() -> None:
    try:
        tuner: Any = resolve_name("peft.tuners.tuners_utils:BaseTuner")
        found: str = resolve_name("peft:__version__")
    except Exception:  # does not work with this transformers: users of PEFT get its own error
        return
    if (why := _why_unknown(found)) is not None:
        wrap(tuner, "inject_adapter", partial(refuse_all, f"PEFT {found} is not supported by hf_fp8: {why}"))
        return
    wrap(tuner, "inject_adapter", inject_adapter)
    wrap(resolve_name("peft.utils.other:ModulesToSaveWrapper"), "update", update_copy)
    wrap_everywhere("peft.utils.other", "prepare_model_for_kbit_training", prepare)
    wrap_everywhere("peft.utils.save_and_load", "get_peft_model_state_dict", with_float_heads)
    if find_spec("peft.tuners.lora.intruders") is not None:  # from 0.21 on
        wrap_everywhere("peft.tuners.lora.intruders", "reduce_intruder_dimension", reduce_intruders)


def _why_unknown(found: str) -> str | None:
    if version.parse(found) < version.parse(OLDEST_PEFT):
        return f"{OLDEST_PEFT} or newer is needed"
    try:
        for name in RELIED_ON:
            resolve_name(name)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None
