"""QuantizedModule, the base class of modules that hold codes (stored 8-bit values) and scales.

Casts leave codes and scales unchanged; state dicts are checked before they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import StateDictError, UnsupportedError
from ..formats.exponents import EXPONENTS, scale_values
from ..formats.quantized_weight.casts import codes_for_certain, is_certain, refuse_own_values, refuse_values
from ..formats.quantized_weight.source import Decoder
from ..formats.quantized_weight.tensor import QuantizedWeight, codes_of, export, is_cast_of, is_whole
from ..formats.weights import Change
from .dtensors import gathered, is_dtensor, let_gather, local
from .parameters import held_by, plain_scale, scale_held
from .shard import Shard

if TYPE_CHECKING:
    from typing_extensions import Self

# Instance attributes that accelerate's hooks or `module.compile()` set and bind to the module.
OF_AN_INSTANCE = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
SCALES = (torch.float32, torch.bfloat16, torch.float16, *EXPONENTS)
# Attribute of a module with scales that are derived from those that it holds, for kernels.
_DERIVED = "_derived_scales"
# Attributes set by PyTorch, transformers or accelerate; any other attribute was set by user code.
OF_A_LAYER = frozenset(
    {*vars(nn.Linear(1, 1, device="meta")), *vars(nn.Conv1d(1, 1, 1, device="meta")), *OF_AN_INSTANCE, "_is_hf_initialized"}
)


def is_ours(module: nn.Module) -> bool:
    """Whether `module` stands in for a float one: it has codes, or is prepared for quantization-aware training."""
    return hasattr(type(module), "foreign")


def foreign_attributes(module: nn.Module) -> tuple[str, ...]:
    """Names of attributes that user code set on a float layer, or on the float layer that a quantized one replaces."""
    if is_ours(module):
        found: tuple[str, ...] = module.foreign  # type: ignore[assignment]
        return found
    return tuple(name for name in vars(module) if name not in OF_A_LAYER)


def holds_codes(model: nn.Module) -> bool:
    """Whether `model` is quantized, or has a quantized module in it."""
    return any(isinstance(module, QuantizedModule) for module in model.modules())


class QuantizedModule(nn.Module):
    """Base class of modules with codes and scales; `holds` maps the name of each codes parameter to those of its scales.

    `.to(dtype)`, `.half()` and similar casts leave codes and scales unchanged, as a cast would change or lose the
    values; casts to 8 bits, in which diffusers keeps modules between calls (layerwise casting), leave biases unchanged, too.
    A state dict with codes of another dtype, or with codes but not their scale, is refused.
    """

    # codes parameter -> its scales: the weight's scale first, then the input's; any of them may be None
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # packed codes -> what else belongs to them: shape, zero points, groups of columns (`formats.storage.PackedCodes`)
    beside: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def quantized(self) -> tuple[str, ...]:
        """Names of all codes and scales, and of what belongs to packed codes."""
        scales = tuple(name for codes, scales in self.holds.items() for name in (codes, *scales))
        return scales + tuple(name for others in self.beside.values() for name in others)

    def of_codes(self) -> list[torch.Tensor]:
        """All codes and scales that it holds."""
        return [tensor for name in self.quantized if (tensor := self._parameters.get(name)) is not None]

    # Names of input scales that are not measured yet, and hold NaN. Kernels get None instead of them.
    unmeasured: tuple[str, ...] = ()
    # codes parameter -> what this process holds of it, if others hold the rest (tensor and expert parallelism)
    shards: Mapping[str, Shard] = {}  # replaced, never changed
    # Dtype of the float weights that were quantized, or of the model that the layer was loaded into; None if not known.
    original_dtype: torch.dtype | None = None

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of float copies of the weights: `original_dtype`, or bfloat16 if that is not known."""
        return self.original_dtype or torch.bfloat16

    # Names of attributes that user code set on the replaced float layer; `swap.copy_hooks` sets them here, too.
    foreign: tuple[str, ...] = ()
    # Its name in the model, for error messages.
    name_in_model: str = ""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's (assigning a parameter calls it); codes become a QuantizedWeight that belongs to this layer."""
        if param is not None and name in self.holds and not is_certain():
            self._bring_scale(name, param)
        super().register_parameter(name, self._as_held(name, param))

    def _bring_scale(self, name: str, param: Any) -> None:
        """Take over the scales together with the codes of another layer, so that both are shared or both are copied.

        Raises UnsupportedError if the scales do not fit, and for values that were cast to the dtype of codes.
        """
        before: Any = self._parameters.get(name)
        if is_dtensor(param):  # FSDP shards the codes that it gathered
            return
        if type(param) is not QuantizedWeight:
            if type(before) is QuantizedWeight and self.original_dtype is not None and before.dtype == param.dtype:
                refuse_own_values(param.detach(), before.codes, before._part, before._source)
            return
        owner = param._source.owner(param._part.whole)
        if (owner is not None and owner[0] is self) or (owner is None and param._source.kept is None):
            return
        if not is_whole(param):
            raise UnsupportedError(
                f"{self.called(name)} was assigned codes of a part of another weight, or in another order, without "
                "matching scales: call hf_fp8.dequantize_model(model) to get weights that can be changed"
            )
        leaf = self.holds[name][0]
        if owner is not None and owner[0]._parameters[owner[1]] is param:
            other = owner[0]._parameters[owner[0].holds[owner[1]][0]]
            if other.numel() == self.scale_count(name):
                self._parameters[leaf] = other  # one parameter, one scale
                return
        self.take_scale(name, param._source.decoder(param._part.whole).scale)

    def take_scale(self, name: str, scale: torch.Tensor) -> None:
        """Replace the scales by those of codes from another layer. Raises UnsupportedError if their shape differs."""
        leaf = self.holds[name][0]
        held = self._parameters[leaf]
        assert held is not None
        if scale.shape != held.shape:
            raise UnsupportedError(
                f"{self.called(name)} was assigned codes with scales of shape {[*scale.shape]}; its scheme has {[*held.shape]}"
            )
        if scale.dtype == held.dtype and not held.is_meta:
            with torch.no_grad():
                held.copy_(scale)
        else:
            self.register_parameter(leaf, nn.Parameter(scale.detach().clone(), requires_grad=False))

    def _as_held(self, name: str, param: Any) -> Any:
        if param is None or name not in self.quantized:
            return param
        if name in self.beside or any(name in others for others in self.beside.values()):
            return param  # integers, which no cast changes, and no code takes for values
        if name in self.holds:
            return held_by(self, name, param)
        return scale_held(param)

    def _hold(self) -> None:
        """Make codes and scales that were written directly into `_parameters` belong to this layer."""
        for name in self.quantized:
            if name in self._parameters:
                self._parameters[name] = self._as_held(name, self._parameters[name])

    def decoder(self, name: str) -> Decoder:
        """The Decoder that dequantizes the codes called `name`."""
        raise NotImplementedError

    def called(self, name: str = "") -> str:
        """The name of this module, or of its parameter `name`, in error messages."""
        module = self.name_in_model or f"a {type(self).__name__}"
        if not name:
            return module
        return f"{module}.{name}" if self.name_in_model else f"{name} of {module}"

    def form_of(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape of the codes called `name` under the scheme, as far as this process holds them."""
        raise NotImplementedError

    def scale_count(self, name: str) -> int:
        """The number of scales that this process holds of the codes called `name` under the scheme."""
        raise NotImplementedError

    def held_scale(self, name: str) -> torch.Tensor:
        """The scales of the codes called `name`, for kernels: floats, also for scales that are held as exponents (`EXPONENTS`).

        Code that is compiled gets these as they are, and kernels convert them. Raises as `stored_scale`.
        """
        if torch.compiler.is_compiling():
            return self.stored_scale(name)
        scale, shard = self._checked_scale(name)
        if shard is None and (scale.dtype not in EXPONENTS or scale.is_meta):
            return scale
        return self._derived_scale(name, shard, scale)

    def stored_scale(self, name: str) -> torch.Tensor:
        """The scales of the codes called `name`, of what this process holds, in the dtype in which they are held.

        Raises UnsupportedError if their number differs from the scheme's, or their dtype is not one of `SCALES`.
        """
        scale, shard = self._checked_scale(name)
        return scale if shard is None else shard.selected(scale.detach())

    def _checked_scale(self, name: str) -> tuple[torch.Tensor, Shard | None]:
        """(the scales that are held, the Shard that selects some of them or None)."""
        leaf = self.holds[name][0]
        found: Any = local(self._parameters.get(leaf))
        if found is None or found.numel() != self.scale_count(name) or found.dtype not in SCALES:
            held = "nothing" if found is None else f"{[*found.shape]} in {found.dtype}"
            raise UnsupportedError(
                f"{self.called(leaf)} is {held}, where its scheme has {self.scale_count(name)} scale(s) in bfloat16, float16, "
                "float32, float8_e8m0fnu or uint8: it was replaced after the layer was quantized"
            )
        scale: torch.Tensor = plain_scale(found)
        shard = self.shards.get(name)
        return scale, shard if shard is not None and shard.selects_scale else None

    def _derived_scale(self, name: str, shard: Shard | None, scale: torch.Tensor) -> torch.Tensor:
        """Those of `scale` that `shard` selects, as floats; derived again only if the scale was changed or replaced."""
        kept = vars(self).setdefault(_DERIVED, {})
        version = 0 if scale.is_inference() else scale._version
        of, at, found = kept.get(name, (None, 0, None))
        if of is not scale or at != version or found is None:
            with torch.inference_mode(False):  # a later call may need gradients of inputs
                found = scale.detach() if shard is None else shard.selected(scale.detach())
                found = scale_values(found)
            if type(found) is torch.Tensor:  # not one of a mode in which nothing is computed
                kept[name] = scale, version, found
        derived: torch.Tensor = found
        return derived

    def held_codes(self, name: str) -> torch.Tensor:
        """The codes called `name` as a plain tensor, for kernels.

        Raises UnsupportedError if they were replaced by a tensor of another dtype or shape.
        """
        found: Any = local(self._parameters.get(name))
        codes: torch.Tensor = found.codes if type(found) is QuantizedWeight else found
        if codes is None or (codes.dtype, codes.shape) != self.form_of(name):
            dtype, shape = self.form_of(name)
            if found is not self._parameters.get(name) and codes.dtype == dtype:
                raise UnsupportedError(
                    f"{self.called(name)} is sharded, and this process holds {[*codes.shape]} of {[*shape]}: FSDP gathers it "
                    "only while the module that it wrapped is called"
                )
            held = "nothing" if codes is None else f"{[*codes.shape]} in {codes.dtype}"
            raise UnsupportedError(
                f"{self.called(name)} is {held}, where its scheme has {[*shape]} codes in {dtype}: it was replaced or cast "
                "after the layer was quantized. model.to(dtype) leaves codes unchanged; to change weights, call "
                "hf_fp8.dequantize_model(model) first"
            )
        return codes

    def refuse_replaced(self) -> None:
        """Raise UnsupportedError if codes or scales do not have the dtype and shape of the scheme."""
        self.refuse_parametrized()
        for name in self.holds:
            sharded: Any = self._parameters.get(name)
            if is_dtensor(sharded) and sharded.dtype == self.form_of(name)[0]:
                continue  # the shape of a DTensor cannot be changed
            self.held_codes(name)
            self.held_scale(name)

    @property
    def has_static_input(self) -> bool:
        """Whether it has static input scales."""
        return bool(self._input_scales())

    def _input_scales(self) -> dict[str, torch.Tensor]:
        names = (name for scales in self.holds.values() for name in scales[1:])
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def needs_calibration(self) -> bool:
        """Whether input scales are not measured yet (`hf_fp8.calibrate`); kernels that need them raise until they are."""
        return bool(self.unmeasured)

    @needs_calibration.setter
    def needs_calibration(self, awaits: bool) -> None:
        self.unmeasured = tuple(self._input_scales()) if awaits else ()

    def see_calibration(self) -> None:
        """Update `unmeasured`: the input scales that are all NaN.

        If only some experts of a stack have a scale, no token was routed to the others: their outputs are NaN.
        """
        here = {name: gathered(scale) for name, scale in self._input_scales().items() if not scale.is_meta}
        self.unmeasured = tuple(name for name, scale in here.items() if not bool(scale.isfinite().any()))

    def await_scale(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> None:
        """Register an input scale that is not measured yet, in the dtype and on the device of `like`."""
        # NaN, so that it is never used as a valid scale by mistake.
        dtype = torch.float32 if like.dtype in EXPONENTS else like.dtype
        self.register_parameter(name, nn.Parameter(like.new_full(shape, torch.nan, dtype=dtype), requires_grad=False))
        if not like.is_meta:
            self.unmeasured = (*self.unmeasured, name)

    def freeze(self) -> None:
        """Set requires_grad=False on codes and scales; the loader may have set it to True."""
        for name in self.quantized:
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.requires_grad_(False)

    @property
    def is_offloaded(self) -> bool:
        """Whether the codes are offloaded (for example to disk) until the module is called."""
        return any(tensor.is_meta for name in self.holds if (tensor := getattr(self, name)) is not None)

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds only a part of the codes now: tensor or expert parallelism, or FSDP between two calls."""
        return any(is_dtensor(self._parameters.get(name)) for name in self.holds)

    def outline(self, dtype: torch.dtype) -> nn.Module:
        """As `to_dense`, with NaN weights that take no memory."""
        raise NotImplementedError

    def refuse_sharded(self, what: str) -> None:
        """Raise UnsupportedError if this process holds only a part of the weights, which `what` needs as a whole."""
        if self.is_sharded:
            raise UnsupportedError(
                f"{self.called()} is sharded over processes, and cannot be {what}: load the checkpoint in one process "
                "for that (and adapters, if there are any: PeftModel.from_pretrained)"
            )

    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """The float module that this one replaces, with dequantized weights, on the same device."""
        raise NotImplementedError

    def requantized(self, dense: nn.Module, generator: torch.Generator | None = None) -> tuple[Self, Change]:
        """A new module of this kind with the quantized weights of `dense`, and the effect of rounding on the change.

        dense: what `to_dense` returned, with weights that were changed since. generator: as in `quantize_weight`.
        Scheme, scale dtypes and input scales are kept. Raises ScaleError for NaN or infinite weights.
        """
        raise NotImplementedError

    def _twin(self) -> Self:
        """A shallow copy that shares parameters, buffers, submodules and hooks, except hooks bound to this instance."""
        new = self.__new__(type(self))
        new.__dict__.update({name: value for name, value in vars(self).items() if name not in (*OF_AN_INSTANCE, _DERIVED)})
        for name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = dict(vars(self)[name])
        new._hold()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "made_of" in state:  # the name of `original_dtype` up to version 0.1
            state = {**state, "original_dtype": state["made_of"]}
            del state["made_of"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold()

    def refuse_parametrized(self) -> None:
        """Raise UnsupportedError if codes or scales are parametrized (`torch.nn.utils.parametrize`)."""
        parametrized: Any = self._modules.get("parametrizations")
        if parametrized is not None and any(name in parametrized for name in self.quantized):
            raise UnsupportedError(
                f"this {type(self).__name__} is parametrized (torch.nn.utils.parametrize), which would change its codes, "
                "not its weights. PEFT adapters are supported: import hf_fp8 before adding them; otherwise load with "
                "FP8Config(dequantize=True)"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        if fn(torch.empty(0, dtype=torch.float32)).itemsize == 1:
            fn = partial(moved_as_it_is, fn=fn)

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            is_quantized = any(tensor is getattr(self, name) for name in self.quantized)
            return moved_as_it_is(codes_of(tensor), fn) if is_quantized else fn(tensor)

        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        if self.original_dtype is not None:
            self.original_dtype = fn(torch.empty(0, dtype=self.original_dtype)).dtype
        sharded = self._sharded()
        for name, tensor in sharded.items():
            if fn(torch.empty(0, dtype=torch.int8, device=tensor.device)).device != tensor.device:
                raise UnsupportedError(f"{self.called(name)} is sharded over processes, and cannot be moved to another device")
            self._parameters[name] = None  # torch would swap it for another, which it cannot while it is referenced
        with codes_for_certain():
            super()._apply(keep_dtype, recurse=False)  # type: ignore[no-untyped-call]
        self._parameters.update(sharded)
        self._hold()
        return self

    def _sharded(self) -> dict[str, Any]:
        """Codes and scales that are DTensors."""
        return {name: held for name in self.quantized if is_dtensor(held := self._parameters.get(name))}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.refuse_replaced()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in self.holds:
                if prefix + name in destination:
                    export(destination[prefix + name], self.decoder(name))
                    let_gather(self, name, destination[prefix + name])  # FSDP may have put it into `_parameters`

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        if torch.__future__.get_swap_module_params_on_conversion():
            raise UnsupportedError(
                f"{prefix.removesuffix('.') or self.called()} cannot load a state dict while "
                "torch.__future__.set_swap_module_params_on_conversion(True) is set: its codes would be swapped for values"
            )
        for name, scales in self.holds.items():
            codes, held_as = state_dict.get(prefix + name), self.form_of(name)[0]
            if codes is not None and (own := self._parameters.get(name)) is not None and is_cast_of(own, codes):
                # The unchanged weight in a float dtype: a head saved with adapters, or a state dict that was cast. Keep
                # codes and scales.
                held, scale = self._parameters[scales[0]], state_dict.get(prefix + scales[0])
                assert held is not None
                if scale is not None and not _same_scale(held, scale):
                    raise StateDictError(
                        f"{prefix}{name} is the weight of this layer, but {prefix}{scales[0]} is not its scale: take both from "
                        "one state dict, or compute with hf_fp8.dequantize_model(model)"
                    )
                state_dict = {**state_dict, prefix + name: own, **({} if scale is None else {prefix + scales[0]: held})}
                continue
            if codes is not None and codes.dtype != held_as:
                raise StateDictError(
                    f"{prefix}{name} is {codes.dtype}: this layer holds codes in {held_as}, and a cast would not quantize it. "
                    "Call hf_fp8.dequantize_model(model), load the state dict, then call hf_fp8.quantize_model(model)"
                )
            needed = [scales[0], *self.beside.get(name, ())]
            if codes is not None and (lacking := [one for one in needed if prefix + one not in state_dict]):
                raise StateDictError(
                    f"{prefix}{name} comes without its {prefix}{lacking[0]}: a state dict of a quantized layer needs both"
                )
            if type(codes) is QuantizedWeight and not self._fits(codes, state_dict[prefix + scales[0]]):
                raise StateDictError(
                    f"{prefix}{name} does not belong to {prefix}{scales[0]}: it is another weight, a part of one, or in "
                    "another order. Take both from one state dict, or compute with hf_fp8.dequantize_model(model)"
                )
            if type(codes) is torch.Tensor and name not in self.beside:  # from a file or from user code
                largest, ratio = self._compared(scales[0], state_dict[prefix + scales[0]])
                refuse_values(codes, self.held_codes(name), prefix + name, largest, ratio)
            for scale_name in scales:
                scale, held = state_dict.get(prefix + scale_name), getattr(self, scale_name)
                if scale is not None and held is not None and scale.dtype != held.dtype:
                    # Keep the dtype of the state dict: no rounding to the dtype held so far.
                    self.register_parameter(scale_name, nn.Parameter(held.detach().to(scale.dtype), requires_grad=False))
        with codes_for_certain():
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        vars(self).pop(_DERIVED, None)  # FSDP gathers scales without a new version
        static = (prefix + name for scales in self.holds.values() for name in scales[1:])
        if any(name in state_dict and not state_dict[name].is_meta for name in static):
            self.see_calibration()

    def _fits(self, codes: QuantizedWeight, scale: torch.Tensor) -> bool:
        """Whether `codes`, an entry of a state dict, belong to `scale`."""
        kept = codes._source.kept
        if kept is None or scale.is_meta or kept.scale.is_meta:
            return is_whole(codes)
        return is_whole(codes) and _same_scale(kept.scale, scale)

    def _compared(self, name: str, new: torch.Tensor) -> tuple[float, float]:
        """(the largest of the held scales; the mean magnitude of the new ones divided by theirs, 0 if the new ones are those of
        a zero weight)."""
        held = getattr(self, name)
        if held.is_meta or new.is_meta:
            return 1.0, 1.0
        before, after = (scale_values(scale.detach()).float().abs() for scale in (held, new))
        of_zeros = float(scale_values(new.new_zeros(()))) if new.dtype in EXPONENTS else torch.finfo(new.dtype).eps
        if bool((after == of_zeros).all()):
            return float(before.max()), 0.0
        mean = before.mean()
        return float(before.max()), float(after.to(mean).mean() / mean)


def _same_scale(held: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether two scales are equal after a cast of the first to the dtype of the second."""
    if held.is_meta or given.is_meta:
        return held.shape == given.shape
    mine, theirs = scale_values(held.detach()), scale_values(given.detach())
    mine = mine.to(theirs.dtype)
    return mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine.device))


def moved_as_it_is(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`tensor` moved as `fn` (such as `.to()`) would move it, with its dtype unchanged."""
    # Ask fn for the device with an empty tensor: codes cast to bf16 would be garbage.
    device = fn(torch.empty(0, dtype=torch.int8, device=tensor.device)).device
    if device == tensor.device:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
