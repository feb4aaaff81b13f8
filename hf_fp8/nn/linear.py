"""QuantizedLinear: an `nn.Linear` with codes (values of 8 or 4 bits) and scales, loaded or quantized from a float weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import ConfigError, UnsupportedError
from ..formats import numerics
from ..formats.code_types import INT8
from ..formats.quantized_weight.casts import codes_for_certain
from ..formats.quantized_weight.source import Decoder
from ..formats.scheme import INT8_DYNAMIC, Scheme, scale_shape
from ..formats.storage import COLUMN_GROUPS, WEIGHT, WEIGHT_SCALE, ZERO_POINT, TensorForm, dequantize, format_of
from ..formats.weights import Change, requantize, scale_dtype_of
from .base import QuantizedModule, moved_as_it_is
from .dtensors import local
from .functional import scaled_linear
from .originals import as_it_is, is_changed, kept, refuse_changed
from .parameters import plain_scale
from .prepared import PreparedCall
from .shard import Shard

if TYPE_CHECKING:
    from typing_extensions import Self

# What to do with the original float weight: discard it, keep it on the device, or offload it to the CPU.
ORIGINALS = ("discard", "keep", "offload")


class QuantizedLinear(QuantizedModule, nn.Linear):
    """Linear layer with `weight` (N, K) in E4M3 or E5M2, `weight_scale` and, for static schemes, `input_scale` (1,).

    With an int8 scheme, `weight` is int8.

    Parameters are the tensors of the file, so `state_dict` and `save_pretrained` work without conversion.
    Outputs have the dtype of the input. `.to(dtype)`, `.half()` and similar casts change only the bias.

    Args:
        in_features, out_features: K and N.
        scheme: how the weight is stored and the input quantized.
        bias: whether there is a bias, of dtype `bias_dtype`.
        scale_dtype, input_scale_dtype: dtypes of the scales (bf16, fp16 or float32; that of the weight may be one of
            `formats.exponents.EXPONENTS`).
        backend: "auto", "scaled_mm", "weight_only" or, with an int8 scheme, "int8"; or "auto_slow_accum" or
            "scaled_mm_slow_accum", without fast accumulation; see `kernels.select`.

    Other attributes:
        compute_dtype: the dtype to which inputs are cast first; None does not cast them. cast_output: whether
            outputs are then cast back to the dtype of the input.
        backward: "exact", or "quantized" to round gradients to 8 bits, too; see `FP8Config`.
        original: the float weight that the layer was quantized from, if it was kept, on the layer's device
            (`originals` "keep") or on the CPU ("offload"). Not part of a state dict; `requantize` and `to_linear` read it. If
            it was changed, running and saving the layer raise StaleError until `requantize`; see `originals.is_changed`.
        follows_original: if True, calls and saving quantize a changed `original` again instead (compiled code raises).
        name_in_model: its name in the model, for error messages.
        original_dtype, trainable: the dtype of that weight (or of the model that the layer was loaded into), and its
            requires_grad; the layer of `to_linear` has both.
        observer: called with each input while the layer is being calibrated.
    """

    _prepared: PreparedCall | None = None
    _across: str = ""  # see `scaled_linear`
    _hf_quantized_needs_local_tp = True  # transformers: under tensor parallelism inputs are plain tensors, also for training
    codes_name: ClassVar[str] = WEIGHT  # of the parameter with the codes
    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {WEIGHT: ("weight_scale", "input_scale")}
    weight_scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        bias_dtype: torch.dtype = torch.bfloat16,
        scale_dtype: torch.dtype = torch.float32,
        input_scale_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would initialise the weight, which fails for E4M3
        if format_of(scheme.weight).codes != self.codes_name:
            raise ConfigError(
                f"a {type(self).__name__} cannot hold weights of {scheme.describe()}: their codes are "
                f"{'packed (PackedLinear)' if scheme.weight.packed else 'not packed (QuantizedLinear)'}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.backend = scheme, backend
        # Name of the parent module, if this layer and its siblings may share one quantized input.
        self.shares_input: str | None = None
        self.compute_dtype: torch.dtype | None = None
        self.cast_output = True
        self.backward = "exact"
        self.original: torch.Tensor | None = None
        self._made_of: torch.Tensor | None = None
        self.originals = "discard"
        self.follows_original = False
        self.trainable = True
        self.observer: Callable[[torch.Tensor], Any] | None = None

        def frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        forms = format_of(scheme.weight).forms(scheme.weight, out_features, in_features, scale_dtype)
        for name, form in forms.items():
            self.register_parameter(name, frozen(form.shape, form.dtype))
        self._codes_form = forms[self.codes_name]
        self._scale_count = self.weight_scale.numel()
        if scheme.has_static_input:
            self.input_scale = frozen((1,), input_scale_dtype or scale_dtype)
        else:
            self.register_parameter("input_scale", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=bias_dtype, device=device))
        else:
            self.register_parameter("bias", None)

    def form_of(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        shard = self.shards.get(name)
        return self._codes_form if shard is None else (self._codes_form.dtype, shard.part.shape)

    @property
    def coded(self) -> nn.Parameter:
        """The parameter with the codes, which layers that share a weight share."""
        found: nn.Parameter = getattr(self, self.codes_name)
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Role -> tensor of the weight that this process holds, as its format (`formats.storage`) takes them."""
        others = {name: getattr(self, name).detach() for name in self.beside.get(self.codes_name, ())}
        return {self.codes_name: self.held_codes(self.codes_name), WEIGHT_SCALE: self.stored_scale(self.codes_name), **others}

    def take_part(self, shard: Shard) -> None:
        """Hold only a part of the weight. Sharding the parameters is up to the caller; in_features and out_features stay."""
        self.shards, self.scheme, self.shares_input = {"weight": shard}, shard.scheme, None
        self._across = shard.across
        if shard.cuts_scale:
            self._scale_count = prod(scale_shape(self.scheme.weight.granularity, *shard.part.shape))

    def scale_count(self, name: str) -> int:
        return self._scale_count

    def decoder(self, name: str) -> Decoder:
        scheme = self.shards["weight"].whole if self.shards else self.scheme  # of codes that are gathered
        decode = partial(numerics.dequantize_rows, granularity=scheme.weight.granularity)
        return Decoder(decode, self.weight_scale, self.float_dtype, self.called(name))

    @classmethod
    def like(cls, linear: nn.Module, scheme: Scheme, *, backend: str = "auto") -> QuantizedLinear:
        """An empty layer on the meta device with the sizes and the bias of `linear`."""
        assert isinstance(linear, nn.Linear)
        new = cls(linear.in_features, linear.out_features, scheme, backend=backend, device="meta")
        new.remember(linear)
        return new

    def remember(self, layer: nn.Module) -> None:
        """Take over the bias, weight dtype, requires_grad and training flag of `layer`, which this one replaces."""
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        self.bias = layer.bias  # type: ignore[assignment]
        self.original_dtype, self.trainable = weight.dtype, weight.requires_grad
        self.train(layer.training)

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme, *, backend: str = "auto", **options: Any) -> QuantizedLinear:
        """Quantize `linear`, a plain nn.Linear with a float weight on any device (including meta).

        options: those of `quantize_from`. The bias is taken over unchanged. Raises ScaleError for NaN or infinite weights.
        """
        new = cls.like(linear, scheme, backend=backend)
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        new.quantize_from(weight.flatten(1), **options)
        return new

    def share_weight(self, other: QuantizedLinear) -> None:
        """Share the weight of `other`: codes, scale and, if kept, the original. The input scale is not shared."""
        for name in format_of(self.scheme.weight).forms(self.scheme.weight, 1, 1, torch.float32):
            setattr(self, name, getattr(other, name))
        self.original, self.originals = other.original, other.originals
        self._made_of = other._made_of
        if self.input_scale is not None and self.input_scale.is_meta and other.input_scale is not None:
            self.await_scale("input_scale", (1,), other.input_scale)

    @torch.no_grad()
    def quantize_from(
        self, weight: torch.Tensor, *, device: torch.device | str | None = None, originals: str = "discard"
    ) -> None:
        """Quantize a float weight (N, K) into this layer, and keep it as `originals` says ("discard", "keep", "offload").

        device: where to compute; results are moved to the device of `weight`. A static input scale is to be measured later.
        """
        if originals not in ORIGINALS:
            raise ConfigError(f"originals={originals!r} is not supported; use one of {', '.join(ORIGINALS)}")
        stored, scheme, home = format_of(self.scheme.weight), self.scheme.weight, weight.device
        if weight.is_meta:
            n, k = weight.shape
            forms = stored.forms(scheme, n, k, scale_dtype_of(weight.dtype, scheme.mx))
            made = {name: torch.empty(form.shape, dtype=form.dtype, device=home) for name, form in forms.items()}
        else:
            made = stored.quantize(weight.detach().to(device or home), scheme)
        with codes_for_certain():
            for name, tensor in made.items():
                setattr(self, name, nn.Parameter(tensor.to(home), requires_grad=False))
        if self.scheme.has_static_input and (self.input_scale is None or self.input_scale.is_meta):
            self.await_scale("input_scale", (1,), self.weight_scale)
        self.originals = originals
        if originals == "discard" or weight.is_meta:
            self.original = None
        else:
            self._keep(weight.detach().to("cpu") if originals == "offload" else weight.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "original":
            value = None if value is None else kept(value)
            self._made_of = None  # `_keep` sets it after this
        super().__setattr__(name, value)

    def _keep(self, weight: torch.Tensor) -> None:
        """Store `weight` as `original`, and take a snapshot, as the codes were computed from it."""
        self.original = weight
        assert self.original is not None
        self._made_of = as_it_is(self.original)

    @property
    def is_stale(self) -> bool:
        """Whether `original` was changed or replaced after the codes were computed from it."""
        return self.original is not None and is_changed(self.original, self._made_of)

    def refuse_stale(self, name: str = "") -> None:
        """Raise StaleError if `is_stale`. name: the layer's name in the message."""
        if self.original is not None:
            refuse_changed(self.original, self._made_of, name or self.name_in_model or f"this {type(self).__name__}")

    def _to_compare(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(original, snapshot) that compiled code compares at run time, else (None, None).

        Exported programs have no original; an original on another device than the codes would disable CUDA graphs.
        """
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if compiled and self.original is not None and self.original.device == self.coded.device:
            return self.original, self._made_of
        return None, None

    def requantize(self) -> None:
        """Quantize `original` again, which may have been changed; `input_scale` is kept.

        Raises UnsupportedError if the original was not kept.
        """
        if self.original is None:
            raise UnsupportedError("the float weight was not kept: quantize with originals='keep' or 'offload'")
        home, original, originals = self.coded.device, self.original, self.originals
        self.quantize_from(original.to(home), originals=originals)
        self._keep(original)

    def invalidate_weight_cache(self) -> None:
        """Take the codes to be out of date: the name that layers of `recipes.enable_fp8_gemm` have for it elsewhere.

        Raises UnsupportedError if the original was not kept.
        """
        if self.original is None:
            raise UnsupportedError("the float weight was not kept: quantize with originals='keep' or 'offload'")
        self._made_of = None

    @torch.inference_mode(False)
    def materialize_fp8_weight(self, device: torch.device | str | None = None) -> None:
        """`requantize` if the original was changed, then move the layer to `device`: the name for it elsewhere, as above."""
        if self.is_stale:
            self.requantize()
        if device is not None:
            self.to(device)

    def reset_parameters(self) -> None:
        """Do nothing: FP8 weights come from a checkpoint or from a float weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., K) in bf16, fp16, float32 or float64. Returns (..., N) in the same dtype (or autocast's).

        Raises CalibrationError if the kernel quantizes inputs with a static scale that is missing or not measured yet
        (kernels that do not quantize inputs, `backend="weight_only"`, do not raise); StaleError if `original` was
        changed (compiled code checks at run time, but not offloaded originals, and not in a recorded CUDA graph).
        """
        if torch.compiler.is_compiling():
            return self._computed(input)
        if self.original is not None:
            if self.follows_original:
                self.materialize_fp8_weight()
            self.refuse_stale()
        if self._prepared is not None and self._prepared.takes(self, input):
            return self._prepared(input)
        out = self._computed(input)
        self._prepared = PreparedCall.of(self, input)
        return out

    def _computed(self, input: torch.Tensor) -> torch.Tensor:
        """The output, by all steps."""
        dtype, backend = input.dtype, self.backend
        if not input.is_meta and dtype != torch.float64 and torch.is_autocast_enabled(input.device.type):
            input = input.to(dtype := torch.get_autocast_dtype(input.device.type))
        if self.observer is not None:
            self.observer(input)
            backend = "weight_only"
        self.refuse_parametrized()
        if self.compute_dtype is not None:
            input = input.to(self.compute_dtype)
        out = scaled_linear(
            input,
            self.held_codes(self.codes_name),
            self.held_scale(self.codes_name),
            self.scheme,
            input_scale=None if self.unmeasured else plain_scale(local(self.input_scale)),
            bias=self.bias,
            backend=backend,
            backward=self.backward,
            layer=self if self.shares_input is not None else None,
            kept=self._to_compare(),
            across=self._across,
            zero_point=self._parameters.get(ZERO_POINT),
            column_groups=self._parameters.get(COLUMN_GROUPS),
        )
        return out.to(dtype) if self.cast_output and out.dtype != dtype else out

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K), or the part that this process holds, dequantized in float32 and rounded once to `dtype`."""
        return dequantize(self.tensors(), self.scheme.weight, self.in_features, dtype)

    def restored_weight(self, dtype: torch.dtype, *, copy: bool = False) -> torch.Tensor:
        """`original` (with `copy`: a copy of it) if it was kept, else the dequantized weight."""
        if self.original is None:
            return self.dequantized_weight(dtype)
        return self.original.to(self.coded.device, dtype, copy=copy)

    @torch.no_grad()
    def requantized(self, dense: nn.Module, generator: torch.Generator | None = None) -> tuple[Self, Change]:
        """As in `QuantizedModule`. If the original was kept, it is replaced by the new weight."""
        self.refuse_sharded("changed")
        changed: torch.Tensor = dense.weight.detach().flatten(1)  # type: ignore[operator]
        stored, scheme, held = format_of(self.scheme.weight), self.scheme.weight, self.tensors()
        made = stored.quantize(changed, scheme, held, generator)
        new, change = self._twin(), Change()
        with codes_for_certain():
            for name, tensor in made.items():
                setattr(new, name, nn.Parameter(tensor, requires_grad=False))
        if self.bias is not None:
            bias: torch.Tensor = dense.bias.detach()  # type: ignore[operator]
            if not torch.equal(bias.to(self.bias.dtype), self.bias):
                new.bias = nn.Parameter(bias.to(self.bias.dtype, copy=True), requires_grad=self.bias.requires_grad)
        if self.original is not None:
            new._keep(changed.to(self.original))
        before, after = (
            stored.pieces(tensors, scheme, self.in_features, torch.float32, numerics.chunk(changed.device))
            for tensors in (held, made)
        )
        for (old, start), (rounded, _) in zip(before, after, strict=True):
            rows = slice(start, start + len(rounded))
            if self.original is not None:
                old = self.original[rows].to(old)
            change.add(old, changed[rows].float(), rounded)
        return new, change

    @torch.no_grad()
    def requantize_int8(self) -> None:
        """Convert the weight in place to int8 with one float32 scale per row; inputs are then quantized to int8 per token.

        E4M3 codes have 4 significant bits and an exponent; int8 has 8 bits relative to the largest value of a row. On
        SmolLM2 int8 weights add 0.15% of perplexity, int8 inputs another 0.1 to 0.4% (docs/accuracy.md). An
        `input_scale` is dropped. Weights that are not FP8 stay as they are. Raises UnsupportedError for an offloaded layer.
        """
        if not self.scheme.weight.code.is_float:
            return
        self.refuse_stale()
        self.refuse_sharded("re-quantized to int8")
        if self.coded.is_meta:
            raise UnsupportedError(
                "backend='int8' re-quantizes weights after loading, and cannot read the weight of an offloaded layer: "
                "load onto one device, or with backend='weight_only'"
            )
        self._take_int8(*requantize(self.held_codes(WEIGHT), self.weight_scale, self.scheme.weight.granularity, INT8))

    def expect_int8(self) -> None:
        """Become an empty int8 layer: for a layer on the meta device, whose weight is re-quantized while it is loaded."""
        shape = self.out_features, self.in_features
        scale = torch.empty((self.out_features, 1), dtype=torch.float32, device="meta")
        self._take_int8(torch.empty(shape, dtype=INT8, device="meta"), scale)

    def _take_int8(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("input_scale", None)
        self.unmeasured = ()
        self.scheme, self.backend, self._scale_count = INT8_DYNAMIC, "int8", scale.numel()
        self._codes_form = TensorForm(codes.dtype, tuple(codes.shape))

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """A plain `nn.Linear` on the same device with a copy of `original` if it was kept, else the dequantized weight.

        Raises UnsupportedError for an offloaded layer, as its weight cannot be read, and for a part of a weight.
        """
        self.refuse_sharded("made dense")
        if self.coded.is_meta:
            raise UnsupportedError(
                "an offloaded QuantizedLinear cannot be dequantized in place: load the model with FP8Config(dequantize=True)"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.restored_weight(dtype, copy=True), requires_grad=self.trainable)
        if self.bias is not None:
            bias = self.bias.detach().to(dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def outline(self, dtype: torch.dtype) -> nn.Linear:
        """As in `QuantizedModule`."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        linear.requires_grad_(False)
        for name, held in linear.named_parameters():
            values = torch.full((), torch.nan, dtype=dtype, device=self.coded.device).expand(held.shape)
            setattr(linear, name, nn.Parameter(values))
        return linear.train(self.training)

    to_linear = to_dense  # also of a subclass whose float module is not a Linear

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        if self.original is not None and self.originals == "keep":
            is_stale, moved = self.is_stale, moved_as_it_is(self.original, fn)
            if is_stale:
                self.original = moved
            else:
                self._keep(moved)
        return result

    def __getstate__(self) -> dict[str, Any]:
        # Version counters restart in a copy (pickle, deepcopy): `__setstate__` takes a new snapshot.
        # A prepared call has addresses of this process.
        made_of = None if self._made_of is None or self.is_stale else True
        return {**super().__getstate__(), "_made_of": made_of, "_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._made_of is not None and self.original is not None:
            self._keep(self.original)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.follows_original:
            self.materialize_fp8_weight()
        self.refuse_stale(prefix.removesuffix("."))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + self.codes_name in state_dict:
            self.original = None  # it belongs to the weight before

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.describe()}, backend={self.backend}"


def refuse_torn(layers: Iterable[QuantizedLinear]) -> None:
    """Raise UnsupportedError if layers that share codes have originals that were changed to different values.

    At first they share one original; `.to()` gives each layer a separate one.
    """
    changed: dict[int, torch.Tensor] = {}
    for layer in layers:
        if layer.original is not None and layer.is_stale:
            first = changed.setdefault(id(layer.coded), layer.original)
            if first is not layer.original and not torch.equal(first, layer.original):
                raise UnsupportedError(
                    f"{layer.name_in_model or 'a layer'} shares its weight with another layer, and their float weights "
                    "(`original`) were changed to different values: make them equal"
                )
