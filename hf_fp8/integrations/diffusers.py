"""Integration with diffusers: a quantizer for its models, registered when it is imported, and `save_pretrained` of codes.

diffusers chooses a quantizer by the `quant_method` of a config, as transformers does (its `quantizers/auto.py`). Up to 0.42 it
has none for "compressed-tensors", the method that is written here: without hf_fp8 loading raises ValueError ("Unknown
quantization type"). "The host" is diffusers, which is never imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoint.config_groups import classes_of, written_config
from ..checkpoint.group_schemes import write_group
from ..checkpoint.quantization_spec import METHOD, METHODS, QuantizationSpec, plain
from ..checkpoint.reader import TORCH_DTYPES, Checkpoint
from ..checkpoint.scan import Owner, scan, weights_of
from ..checkpoint.stored_weight import StoredWeight, check_scale_values
from ..errors import ConfigError, MismatchError, MissingTensorError, UnsupportedError, by_reason, first, reasons_of
from ..formats.quantized_weight.casts import codes_for_certain
from ..formats.scheme import Scheme
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from ..loading.quantization_plan import why_unfit
from ..nn.base import QuantizedModule, holds_codes
from ..nn.linear import QuantizedLinear
from ..nn.packed_linear import linear_of
from ..nn.swap import choose_fused_paths, copy_hooks, let_siblings_share, swap_back, swap_linear
from .config import OUR_METHOD, FP8Config
from .import_hook import after_import, cancel
from .linears import candidates
from .patches import is_patched, wrap, wrap_everywhere
from .peft.merge_policy import reporting
from .peft.state import adapters
from .requests import asked_for, for_quantizing
from .saving import refuse_unwritable
from .weight_readers import guard_readers

logger = logging.get_logger(__name__)

Merge = Callable[[dict[str, Any], Any], FP8Config]
_QUANTIZERS, _MODELS = "diffusers.quantizers.auto", "diffusers.models.modeling_utils"
_ADAPTERS, _LORA = "diffusers.loaders.peft", "diffusers.loaders.lora_pipeline"
_EXPAND = "_maybe_expand_transformer_param_shape_or_error_"
_CLASS = "FP8DiffusersQuantizer"  # a global of this module as soon as diffusers is imported
_KEY = "quantization_config"
_replaced: list[tuple[dict[str, Any], str, Any]] = []  # (table of the host, method, what it had)


def install(merge: Merge) -> None:
    """Register the quantizer: now if the host is imported, else as soon as it is. Harmless when repeated.

    merge: makes one FP8Config of the config of a checkpoint and of what a user passes beside it.
    """
    after_import(_QUANTIZERS, partial(_register, merge))
    after_import(_MODELS, _teach_models)
    after_import(_ADAPTERS, _teach_fusing)
    after_import(_LORA, _teach_expanding)


def uninstall() -> None:
    """Take the quantizer out of the host's tables. `patches.restore` restores what is replaced."""
    for module in (_QUANTIZERS, _MODELS, _ADAPTERS, _LORA):
        cancel(module)
    while _replaced:
        table, method, before = _replaced.pop()
        if before is None:
            table.pop(method, None)
        else:
            table[method] = before


def _register(merge: Merge) -> None:
    auto: Any = sys.modules[_QUANTIZERS]
    if _CLASS not in globals():
        base = sys.modules["diffusers.quantizers.base"].DiffusersQuantizer
        made = type(_CLASS, (Hooks, base), {"__module__": __name__, "__doc__": Hooks.__doc__})
        globals()[_CLASS] = made  # so that models can be pickled
    for method in (METHOD, OUR_METHOD):
        for table, ours in (
            (auto.AUTO_QUANTIZER_MAPPING, globals()[_CLASS]),
            (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, FP8Config),
        ):
            if table.get(method) is not ours:
                _replaced.append((table, method, table.get(method)))
                table[method] = ours
    wrap(auto.DiffusersAutoQuantizer, "merge_quantization_configs", partial(_merged, merge))


def _teach_models() -> None:
    if _QUANTIZERS not in sys.modules:
        return  # before 0.31: it would not look at the config
    wrap(sys.modules[_MODELS].ModelMixin, "save_pretrained", save_pretrained)
    wrap_everywhere(_MODELS, "get_parameter_dtype", float_dtype)


def _teach_fusing() -> None:
    wrap(sys.modules[_ADAPTERS].PeftAdapterMixin, "fuse_lora", _fuse)


def _teach_expanding() -> None:
    loader = getattr(sys.modules[_LORA], "FluxLoraLoaderMixin", None)
    if _EXPAND in vars(loader or object):
        wrap(loader, _EXPAND, _expand)


def _expand(host: Any, cls: Any, transformer: Any, lora_state_dict: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Loads an adapter with more inputs than its layer, as Flux's control adapters have: the host adds columns to the weight,
    so the layer is made dense first."""
    prefix = f"{kwargs.get('prefix') or cls.transformer_name}."
    named = {key.removeprefix(prefix): value for key, value in (lora_state_dict or {}).items()}
    for name, module in list(transformer.named_modules()):
        down = named.get(f"{name.replace('.base_layer', '')}.lora_A.weight")
        if isinstance(module, QuantizedLinear) and down is not None and down.shape[1] > module.in_features:
            dense = module.to_dense(module.float_dtype)
            copy_hooks(module, dense)
            transformer.set_submodule(name, dense)
            logger.warning(f"hf_fp8: {name} is made dense, because the adapter that is loaded adds inputs to it")
    return host(cls, transformer, lora_state_dict, *args, **kwargs)


def _fuse(host: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """`fuse_lora`, with one report of all layers instead of one for each."""
    with reporting():
        return host(self, *args, **kwargs)


def _merged(merge: Merge, host: Any, cls: Any, written: Any, passed: Any) -> Any:
    """`DiffusersAutoQuantizer.merge_quantization_configs`, which ignores what a user passes beside a checkpoint's config."""
    if isinstance(written, Mapping) and plain(written.get("quant_method")) in METHODS:
        return merge(plain(written), passed)
    return host(cls, written, passed)


class Hooks:
    """The host's hooks: loads codes and scales as they are in the files, or quantizes weights one by one while they are read.

    Linears with codes are kept on every device, also with backend="auto": pipelines are loaded on the CPU and moved later.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        config = asked_for(quantization_config)
        # `from_single_file` does not say whether it is quantized.
        self.pre_quantized = bool(kwargs.get("pre_quantized", True)) and config.scheme is None and config.checkpoint is not None
        if not self.pre_quantized:
            if config.scheme is None and not config.spec.our_groups:
                raise ConfigError(
                    "FP8Config was passed, but the model's config.json has no compressed-tensors `quantization_config`. Pass "
                    "FP8Config(scheme='FP8_DYNAMIC'), or another scheme, to quantize it while loading; or load it without"
                )
            config = for_quantizing(config)
        elif config.spec.host_groups or not config.spec.our_groups:
            group = (*config.spec.host_groups, *config.spec.groups)[0]
            raise UnsupportedError(
                f"config group {group.name!r} has weights in the format {group.format}, which hf_fp8 does not run in a "
                "diffusers model: it supports FP8, int8, and packed int4 and int8"
            )
        self.quantization_config = config
        self.modules_to_not_convert: list[str] = []
        self.planned: dict[str, Scheme] = {}
        self._missing: set[str] = set()  # names of parameters with codes and scales, or to be quantized, until they are read
        self._files: list[str] = []
        self._dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise UnsupportedError for a `device_map` that offloads to disk: there the host would cast scales."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UnsupportedError(
                "the device_map offloads to disk, where diffusers would cast scales to another dtype: load onto the CPU and "
                "call enable_model_cpu_offload or enable_group_offload"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self._dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Takes the names of the files, which no other hook gets."""
        self._files = [str(file) for file in checkpoint_files]
        return loaded_keys

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtypes that weights will have, for the sizes in an automatic device map."""
        return {f"{name}.{WEIGHT}": scheme.weight.storage for name, scheme in self.planned.items()}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            self._place_stored(model)
        else:
            self._plan(model)

    def _plan(self, model: nn.Module) -> None:
        """Choose the Linears that are quantized when their weights are read. Raises ConfigError if there are none."""
        spec, reasons, used, named = self.quantization_config.spec, dict[str, str](), set[str](), []
        for found in candidates(model, conv1x1=False):
            named.append((found.name,))
            group = spec.group_of((found.name,), {"Linear", *classes_of(type(found.module))})
            if group is None or group.scheme is None:
                continue
            why = found.reason or why_unfit(group.scheme, tuple(found.module.weight.shape))  # type: ignore[arg-type]
            if why is not None:
                reasons[found.name] = why
                continue
            used.add(group.name)
            self.planned[found.name] = group.scheme
        for group in spec.groups:
            if group.name not in used:
                said = f" ({reasons_of(reasons)})" if reasons else ""
                raise ConfigError(
                    f"no layer of {type(model).__name__} is quantized by targets {list(group.targets)}, ignore "
                    f"{list(spec.ignore)}{said}"
                )
        for entry in spec.unmatched_ignore(named):
            logger.warning(f"hf_fp8: {entry!r} in `ignore` matches no Linear of {type(model).__name__}")
        if reasons:
            logger.warning(f"hf_fp8: not quantized: {by_reason(reasons)}")
        self._missing = {f"{name}.{WEIGHT}" for name in self.planned}

    def _place_stored(self, model: nn.Module) -> None:
        """Compare config, files and model, and put empty quantized layers where the files have codes."""
        if not self._files:
            raise UnsupportedError(
                "from_single_file can quantize while loading (FP8Config with a scheme), but reads no quantized weights: use "
                "hf_fp8.load_fp8_state_dict for a file with scales, or from_pretrained for a folder"
            )
        for weight in _stored(model, Checkpoint(self._files), self.quantization_config.spec):
            dtypes = {role: TORCH_DTYPES[dtype] for role, dtype in weight.dtypes.items()}
            layer = swap_linear(
                model, weight.name, weight.scheme, scale_dtype=dtypes[WEIGHT_SCALE],
                input_scale_dtype=dtypes.get(INPUT_SCALE), backend=self.quantization_config.backend,
            )  # fmt: skip
            if INPUT_SCALE not in weight.keys:
                layer.register_parameter(INPUT_SCALE, None)  # raises CalibrationError where it is needed
            held = [name for name in layer.quantized if layer._parameters.get(name) is not None]
            self._missing |= {f"{weight.name}.{name}" for name in held}
            self.planned[weight.name] = weight.scheme

    def check_if_quantized_param(self, model: Any, param_value: Any, param_name: str, state_dict: Any, **kwargs: Any) -> bool:
        return param_name in self._missing

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> bool:
        return True  # compared before anything is read

    @torch.no_grad()
    def create_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, target_device: Any, state_dict: Any, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Put a tensor of the files into its layer; or quantize it. param_value: the tensor, cast to the model's dtype."""
        name, _, leaf = param_name.rpartition(".")
        module: Any = model.get_submodule(name)
        if self.pre_quantized:
            value = state_dict[param_name].to(target_device).reshape(module._parameters[leaf].shape)
            with codes_for_certain():
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.weight = nn.Parameter(param_value.to(target_device), requires_grad=module.weight.requires_grad)
            scheme, config = self.planned[name], self.quantization_config
            layer = linear_of(scheme).from_linear(module, scheme, backend=config.backend)
            copy_hooks(module, layer)
            layer.name_in_model = name
            model.set_submodule(name, layer)
        self._missing.discard(param_name)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self._missing:
            raise MissingTensorError(
                f"{first(sorted(self._missing))} of {type(model).__name__} were not read: they are not in the files, or "
                "offload_state_dict was set, with which diffusers would cast scales"
            )
        for name in self.planned:
            layer: QuantizedLinear = model.get_submodule(name)
            layer.freeze()
            if self.pre_quantized:
                layer.see_calibration()
                layer.original_dtype = self._dtype or torch.get_default_dtype()
            layer.backward = config.backward
            if config.backend == "int8":
                layer.requantize_int8()
        self._files = []
        model.is_quantized = False  # the host refuses casts of such models, which saving adapters needs; layers here take them
        if config.dequantize:
            self.dequantize(model)
            return
        let_siblings_share(model)
        choose_fused_paths(model)
        guard_readers(model)
        describe(model)

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """`model.dequantize()` of the host, and `hf_fp8.dequantize_model`."""
        swap_back(model, dtype, default=self._dtype)
        forget(model)
        return model

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def get_state_dict_and_metadata(self, state_dict: Any, safe_serialization: bool = False) -> tuple[Any, dict[str, str]]:
        return state_dict, {}

    @property
    def supports_parallel_loading(self) -> bool:
        return False  # a layer is replaced when its weight is read, and its bias may be read meanwhile

    @property
    def supports_safetensors_serialization(self) -> bool:
        return True

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stored(model: nn.Module, checkpoint: Checkpoint, spec: QuantizationSpec) -> list[StoredWeight]:
    """The quantized weights of the files, each of a Linear of `model`.

    Raises a subclass of CheckpointError, naming the tensor, if config, files and model contradict each other.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    reasons = {found.name: found.reason for found in candidates(model, conv1x1=False)}
    owners = {}
    for key, name in weights_of(checkpoint).items():
        module = modules.get(name)
        has_weight = module is not None and WEIGHT in module._parameters
        owners[key] = Owner((name,), None if module is None else name, None if module is None else type(module), has_weight)
    found = scan(checkpoint, spec, owners, dict(model.named_parameters())).weights
    for weight in found:
        weight.check()
        weight.check_shapes()
        module = modules.get(weight.name)
        key = weight.keys[weight.primary]
        if not isinstance(module, nn.Linear):
            what = "has no such module" if module is None else f"has a {type(module).__name__} there"
            raise MismatchError(f"{key} is quantized in the files, but {type(model).__name__} {what}, not a Linear")
        if not weight.takes((module.out_features, module.in_features)):
            raise MismatchError(f"{key} has shape {list(weight.shape)} in the files, but {module} in {type(model).__name__}")
        if (why := reasons.get(weight.name)) is not None:
            raise UnsupportedError(f"{key} is quantized in the files, and {weight.name} must be dense: {why}")
    check_scale_values(found, checkpoint)
    return found


def float_dtype(host: Any, parameter: Any) -> torch.dtype | None:
    """`get_parameter_dtype`, and so `model.dtype`, to which pipelines and models cast inputs: never that of codes or scales."""
    found: torch.dtype | None = host(parameter)
    quantized = [module for module in parameter.modules() if isinstance(module, QuantizedModule)]
    if not quantized or getattr(_casting(parameter), "compute_dtype", None) is not None:
        return found
    codes = {id(tensor) for module in quantized for tensor in module.of_codes()}
    wide = getattr(parameter, "_keep_in_fp32_modules", None) or ()
    for name, tensor in parameter.named_parameters():
        if tensor.is_floating_point() and id(tensor) not in codes and not any(part in name for part in wide):
            kept: torch.dtype = tensor.dtype
            return kept
    return quantized[0].float_dtype


def _casting(model: nn.Module) -> Any:
    """The host's hook that casts a module of `model` for each call (layerwise casting), None if there is none."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = (registry.get_hook("layerwise_casting") for registry in registries if registry is not None)
    return next((hook for hook in hooks if hook is not None), None)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model with quantized Linears, by what they are now: groups of schemes, dense ones ignored.

    Raises UnsupportedError, naming it, for a quantized layer that no config group describes.
    """
    layers: dict[Scheme, list[str]] = {}
    dense = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear):
            layers.setdefault(module.scheme, []).append(name)
        elif isinstance(module, QuantizedModule):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__}, which diffusers cannot load: save with hf_fp8.save_quantized, or call "
                "hf_fp8.dequantize_model(model) first"
            )
        elif isinstance(module, nn.Linear):
            dense.append(name)
    ordered = sorted(layers.items(), key=lambda found: -len(found[1]))
    groups = {
        f"group_{number}": write_group(scheme, ["Linear"] if number == 0 else names)
        for number, (scheme, names) in enumerate(ordered)
    }
    return written_config(groups, dense)


def is_described(model: nn.Module) -> bool:
    """Whether `model` is one of the host's, whose `save_pretrained` describes its quantized layers."""
    models = sys.modules.get(_MODELS)
    return models is not None and isinstance(model, models.ModelMixin) and is_patched(models.ModelMixin, "save_pretrained")


def describe(model: Any) -> None:
    """Set the `quantization_config` in the config of a host's model to what its layers are now."""
    model.register_to_config(**{_KEY: config_of(model)})


def forget(model: Any) -> None:
    """Make the host take `model`, whose layers are dense now, for a dense one."""
    vars(model).pop("hf_quantizer", None)
    kept = {key: value for key, value in model.config.items() if key != _KEY}
    model._internal_dict = type(model._internal_dict)(kept)


def _not_quantized(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters of a model outside of its quantized layers, by name."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    inside = {id(tensor) for module in quantized for tensor in module.parameters()}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in inside]


def save_pretrained(host: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """`ModelMixin.save_pretrained`, which writes what `state_dict` has: codes and scales. Here the config is made to say so.

    Raises CalibrationError, StaleError or UnsupportedError, before anything is written, for layers that cannot be saved.
    """
    if holds_codes(self):
        refuse_unwritable(self)
        if (adapter := adapters(self)) is not None:
            raise UnsupportedError(
                f"{adapter} has an adapter, which a checkpoint of the model cannot contain: save it by itself "
                "(save_lora_adapter), and unload it (model.unload_lora(), pipe.unload_lora_weights()), after fuse_lora() if "
                "the model is to keep its change"
            )
        offloaded = [name for name, m in self.named_modules() if isinstance(m, QuantizedModule) and m.is_offloaded]
        if offloaded:
            raise UnsupportedError(f"{first(offloaded)} are offloaded, and cannot be saved: move the model to the CPU first")
        cast = [name for name, parameter in _not_quantized(self) if parameter.is_floating_point() and parameter.itemsize == 1]
        if cast:
            raise UnsupportedError(
                f"{first(cast)} are held in 8 bits by layerwise casting, and would be read as codes: save the model before "
                "enable_layerwise_casting"
            )
        if kwargs.get("use_flashpack"):
            raise UnsupportedError("use_flashpack casts all tensors to one dtype, codes too: leave it out")
        describe(self)
    elif isinstance(found := self.config.get(_KEY), Mapping) and found.get("quant_method") == METHOD:
        forget(self)  # it has been dequantized
    return host(self, save_directory, *args, **kwargs)
