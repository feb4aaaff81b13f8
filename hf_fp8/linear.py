"""FP8Linear: an `nn.Linear` whose weight and scales are the checkpoint's own tensors, or made of a float weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from . import numerics
from .changes import Change
from .errors import ConfigError, UnsupportedError
from .functional import scaled_linear
from .quantized_module import QuantizedModule, moved_as_it_is
from .scheme import INT8, INT8_DYNAMIC, Scheme, scale_shape

if TYPE_CHECKING:
    from typing_extensions import Self

# What becomes of the float weight that a layer was quantized from.
ORIGINALS = ("discard", "keep", "offload")


class FP8Linear(QuantizedModule, nn.Linear):
    """Linear layer with `weight` (N, K) in E4M3, `weight_scale` and, for static schemes, `input_scale` (1,).

    With an int8 scheme, `weight` is int8.

    The parameters are the tensors of the file, so `state_dict` and `save_pretrained` need no code.
    Outputs have the dtype of the input. `.to(dtype)`, `.half()` and the like cast the bias alone.

    Args:
        in_features, out_features: K and N.
        scheme: how the weight is stored and the input quantized.
        bias: whether there is a bias, of dtype `bias_dtype`.
        scale_dtype, input_scale_dtype: dtypes in which the scales are held (bf16, fp16 or float32).
        backend: "auto", "scaled_mm", "weight_only" or, with an int8 scheme, "int8"; see `kernels.select`.

    Attributes that are no arguments:
        compute_dtype: the dtype to which inputs are cast first; None takes them as they are. cast_output: whether
            outputs are then cast back to the dtype of the input.
        backward: "exact", or "quantized" to round gradients to 8 bits, too; see `FP8Config`.
        original: the float weight that the layer was quantized from, if it was kept, on the layer's device
            (`originals` "keep") or on the CPU ("offload"). In no state dict; `requantize` and `to_linear` read it.
        made_of, trainable: the dtype of that weight (or of the model that the layer was loaded into), and whether it asked
            for gradients; what `to_linear` gives has both.
        awaits_calibration: whether `input_scale` has yet to be measured (`hf_fp8.calibrate`).
        observer: called with each input while the layer is being calibrated.
    """

    holds: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight": ("weight_scale", "input_scale")}

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
        nn.Module.__init__(self)  # nn.Linear's would initialise the weight, which E4M3 cannot
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.backend = scheme, backend
        # The name of what this layer and its siblings are part of, if they may quantize a common input once.
        self.shares_input: str | None = None
        self.compute_dtype: torch.dtype | None = None
        self.cast_output = True
        self.backward = "exact"
        self.original: torch.Tensor | None = None
        self.originals = "discard"
        self.trainable = True
        self.awaits_calibration = False
        self.observer: Callable[[torch.Tensor], Any] | None = None

        def frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight = frozen((out_features, in_features), scheme.weight.dtype)
        self.weight_scale = frozen(scale_shape(scheme.weight.granularity, out_features, in_features), scale_dtype)
        if scheme.has_static_input:
            self.input_scale = frozen((1,), input_scale_dtype or scale_dtype)
        else:
            self.register_parameter("input_scale", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=bias_dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def like(cls, linear: nn.Module, scheme: Scheme, *, backend: str = "auto") -> FP8Linear:
        """An empty layer on the meta device for what `linear` computes, with its bias as it is."""
        assert isinstance(linear, nn.Linear)
        new = cls(linear.in_features, linear.out_features, scheme, backend=backend, device="meta")
        new.remember(linear)
        return new

    def remember(self, layer: nn.Module) -> None:
        """Take over what of `layer`, which this one stands for, is not its weight."""
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        self.bias = layer.bias  # type: ignore[assignment]
        self.made_of, self.trainable = weight.dtype, weight.requires_grad
        self.train(layer.training)

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme, *, backend: str = "auto", **options: Any) -> FP8Linear:
        """The layer that `linear`, a plain nn.Linear with a float weight on any device (meta too), is in `scheme`.

        options: those of `quantize_from`. The bias is taken over as it is. Raises ScaleError for NaN or infinite weights.
        """
        new = cls.like(linear, scheme, backend=backend)
        weight: torch.Tensor = linear.weight  # type: ignore[assignment]
        new.quantize_from(weight.flatten(1), **options)
        return new

    def share_weight(self, other: FP8Linear) -> None:
        """Hold the weight of `other`: codes, scale and the original, if it was kept. Inputs, and their scale, are its own."""
        self.weight, self.weight_scale = other.weight, other.weight_scale
        self.original, self.originals = other.original, other.originals
        if self.input_scale is not None and self.input_scale.is_meta and other.input_scale is not None:
            self.input_scale = nn.Parameter(torch.full_like(other.input_scale, torch.nan), requires_grad=False)
            self.awaits_calibration = not other.weight.is_meta

    @torch.no_grad()
    def quantize_from(
        self, weight: torch.Tensor, *, device: torch.device | str | None = None, originals: str = "discard"
    ) -> None:
        """Make codes and scale of a float weight (N, K), and keep it as `originals` says ("discard", "keep", "offload").

        device: where to compute; the results are put where the weight is. An input scale has yet to be measured then.
        """
        if originals not in ORIGINALS:
            raise ConfigError(f"originals={originals!r}: it is one of {', '.join(ORIGINALS)}")
        granularity, home = self.scheme.weight.granularity, weight.device
        scale_dtype = numerics.scale_dtype_of(weight.dtype)
        if weight.is_meta:
            codes = torch.empty(weight.shape, dtype=self.scheme.weight.dtype, device=home)
            scale = torch.empty(scale_shape(granularity, *weight.shape), dtype=scale_dtype, device=home)
        else:
            there = weight.detach().to(device or home)
            codes, scale = (part.to(home) for part in numerics.quantize_weight(there, granularity, self.scheme.weight.dtype))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if self.scheme.has_static_input and (self.input_scale is None or self.input_scale.is_meta):
            # NaN, so that it cannot be taken for a scale wherever it gets to.
            unknown = torch.full((1,), torch.nan, dtype=scale_dtype, device=home)
            self.input_scale = nn.Parameter(unknown, requires_grad=False)
            self.awaits_calibration = not weight.is_meta
        self.originals = originals
        if originals == "discard" or weight.is_meta:
            self.original = None
        else:
            self.original = weight.detach().to("cpu") if originals == "offload" else weight.detach()

    def requantize(self) -> None:
        """Make codes and scale anew of `original`, which may have been changed since; `input_scale` stays.

        Raises UnsupportedError if the original was not kept.
        """
        if self.original is None:
            raise UnsupportedError("the float weight was not kept: quantize with originals='keep' or 'offload'")
        home, original, originals = self.weight.device, self.original, self.originals
        self.quantize_from(original.to(home), originals=originals)
        self.original = original

    def reset_parameters(self) -> None:
        """Nothing: FP8 weights come from a checkpoint or from a float weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (..., K) in bf16, fp16 or float32. Returns (..., N) in the same dtype (or autocast's).

        Raises CalibrationError if the scale of its inputs has yet to be measured.
        """
        dtype, backend = input.dtype, self.backend
        if not input.is_meta and torch.is_autocast_enabled(input.device.type):
            input = input.to(dtype := torch.get_autocast_dtype(input.device.type))
        if self.observer is not None:
            self.observer(input)
            backend = "weight_only"
        else:
            self.refuse_uncalibrated()
        self.refuse_parametrized()
        if self.compute_dtype is not None:
            input = input.to(self.compute_dtype)
        out = scaled_linear(
            input,
            self.weight,
            self.weight_scale,
            self.scheme,
            input_scale=self.input_scale,
            bias=self.bias,
            backend=backend,
            backward=self.backward,
            layer=self if self.shares_input is not None else None,
        )
        return out.to(dtype) if self.cast_output and out.dtype != dtype else out

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight (N, K) multiplied out in float32 and rounded once to `dtype`."""
        return numerics.dequantize(self.weight, self.weight_scale, self.scheme.weight.granularity, dtype)

    def restored_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The float weight: the original itself if it was kept, else the dequantized one."""
        if self.original is None:
            return self.dequantized_weight(dtype)
        return self.original.to(self.weight.device, dtype)

    @torch.no_grad()
    def requantized(self, dense: nn.Module, chance: torch.Generator | None = None) -> tuple[Self, Change]:
        """As in `QuantizedModule`. An original that was kept is now the new weight."""
        changed: torch.Tensor = dense.weight.detach().flatten(1)  # type: ignore[operator]
        granularity = self.scheme.weight.granularity
        codes, scale = numerics.quantize_weight(changed, granularity, self.scheme.weight.dtype, self.weight_scale, chance)
        new, change = self._twin(), Change()
        new.weight = nn.Parameter(codes, requires_grad=False)
        new.weight_scale = nn.Parameter(scale, requires_grad=False)
        if self.bias is not None:
            bias: torch.Tensor = dense.bias.detach()  # type: ignore[operator]
            if not torch.equal(bias.to(self.bias.dtype), self.bias):
                new.bias = nn.Parameter(bias.to(self.bias.dtype, copy=True), requires_grad=self.bias.requires_grad)
        if self.original is not None:
            new.original = changed.to(self.original)
        for after, part, start in numerics.pieces(codes, scale, granularity, numerics.chunk(codes.device)):
            rows = slice(start, start + len(after))
            change.add(self._rows(rows), changed[rows].float(), numerics.dequantize(after, part, granularity))
        return new, change

    def _rows(self, rows: slice) -> torch.Tensor:
        """Rows of the weight in float32, whole blocks of them."""
        if self.original is not None:
            return self.original[rows].to(self.weight.device, torch.float32)
        granularity = self.scheme.weight.granularity
        height = max(granularity.rows, 1)
        grid = self.weight_scale.reshape(granularity.grid(*self.weight.shape))
        scale = grid if granularity.rows == -1 else grid[rows.start // height : -(-rows.stop // height)]
        return numerics.dequantize(self.weight[rows], scale, granularity)

    @torch.no_grad()
    def requantize_int8(self) -> None:
        """Turn the weight into int8 with one float32 scale per row, in place; inputs become int8 per token.

        Codes of E4M3 have 4 significant bits and their own exponent, int8 has 8 bits below the largest of a row. On
        SmolLM2 int8 weights add 0.15% of perplexity, int8 inputs another 0.1 to 0.4% (docs/accuracy.md). An
        `input_scale` is dropped. Raises UnsupportedError for an offloaded layer.
        """
        if self.scheme.weight.dtype == INT8:
            return
        if self.weight.is_meta:
            raise UnsupportedError(
                "backend='int8' re-quantizes weights after loading, and an offloaded layer's weight is not here to be read: "
                "load onto one device, or with backend='weight_only'"
            )
        codes, scale = numerics.requantize(self.weight, self.weight_scale, self.scheme.weight.granularity, INT8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("input_scale", None)
        self.scheme, self.backend = INT8_DYNAMIC, "int8"

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """`to_linear`."""
        return self.to_linear(dtype)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain `nn.Linear` with the dequantized weight, on the same device.

        Raises UnsupportedError for an offloaded layer, whose weight is not here to be read.
        """
        if self.weight.is_meta:
            raise UnsupportedError(
                "an offloaded FP8Linear cannot be dequantized in place: load the model with FP8Config(dequantize=True)"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.restored_weight(dtype), requires_grad=self.trainable)
        if self.bias is not None:
            bias = self.bias.detach().to(dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        if self.original is not None and self.originals == "keep":
            self.original = moved_as_it_is(self.original, fn)
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict:
            self.original = None  # of another weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme.describe()}, backend={self.backend}"
