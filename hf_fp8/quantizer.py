"""FP8HfQuantizer: the door through which `from_pretrained` and `save_pretrained` reach all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging

from .checkpoint import DENSE_DTYPES, TORCH_DTYPES, Checkpoint
from .config import FP8Config, remember
from .conversion import AsItIs, KeyRenaming, RoutedConverter
from .convert import let_siblings_share, swap_back, swap_experts, swap_linear, untie
from .errors import ConfigError, ScaleError, UnsupportedError
from .explain import NOTES, by_reason
from .kernels import why_not_kept, why_not_kept_experts
from .layout import lay_out
from .linear import FP8Linear
from .placement import compute_device
from .plan import Plan, plan_quantization
from .quantized_module import QuantizedModule
from .saving import any_number, fit_config, is_dense_now, leave_experts, recompress, refuse_unwritable
from .scheme import FP8, Scheme
from .stored import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, ZERO_POINTS
from .transforms import Layout, for_saving

logger = logging.get_logger(__name__)
KEEP_EXPERTS = "experts='fp8' keeps experts in FP8 anywhere, in half their memory; on CPUs it is slower."


class FP8HfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads compressed-tensors FP8 checkpoints: FP8 groups here, other groups through the host's quantizer.

    The model is changed in `update_weight_conversions`, not in `preprocess_model`: only there are all
    of the loader's renamings known, the user's `key_mapping` among them, and so which tensor goes where.
    """

    quantization_config: FP8Config

    def __init__(self, quantization_config: FP8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layout: Layout | None = None
        self.host: CompressedTensorsHfQuantizer | None = None
        self.passengers: dict[str, torch.Tensor] = {}
        self._host_scales: dict[str, torch.Tensor] = {}
        self._files: list[str] = []
        self._device_map: Any = None
        self._use_kernels = False
        self._dtype = torch.bfloat16
        self._dense_because: str | None = None
        self._dense: list[str] = []
        self._host_conversions: list[WeightTransform] = []
        self.planned: Plan | None = None  # of quantizing while loading
        self._read_values = True

    # -- what the host asks before and after loading --

    def validate_environment(self, *args: Any, weights_only: bool = True, **kwargs: Any) -> None:
        if not weights_only:
            raise UnsupportedError("weights_only=False lets a pickled checkpoint execute code; leave it at True")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Without a dtype in config.json the host takes that of the first tensor in the files, which may be codes."""
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise UnsupportedError(
                "hf_fp8 reads FP8 checkpoints from files, to hold them against their config before anything is loaded; "
                "save the state dict with its config and load the folder"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedError(
                "hf_fp8 does not shard FP8 weights over processes yet (distributed_config, tp_plan): load with a device_map, "
                "or load with FP8Config(dequantize=True), save, and shard the dense checkpoint"
            )
        self._files, self._device_map = list(files), kwargs.get("device_map")
        self._use_kernels = bool(kwargs.get("use_kernels"))
        self._dtype = dtype or torch.get_default_dtype()
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Not the host's swap of Llama-4's experts for a list of Linears: experts are merged like any other family's."""

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        if self.layout is None:
            self._host_conversions = list(weight_conversions)
            checkpoint = Checkpoint(self._files)
            if self.quantization_config.of_another_load and not checkpoint.has_fp8:
                if any(tensor.dtype == "I8" for tensor in checkpoint.tensors.values()):
                    raise ConfigError(
                        "the `config` that was passed is of a model loaded from FP8, but the files hold int8 codes, which it "
                        "says nothing of: leave `config` out"
                    )
                self.quantization_config.dequantize = True  # a plain checkpoint after all
                return list(weight_conversions)
            self._lay_out(model, weight_conversions, checkpoint)
        assert self.layout is not None
        if self.host is None:
            return list(self.layout.conversions)
        ours = [c for c in self.layout.conversions if isinstance(c, RoutedConverter)]
        rest = [c for c in self.layout.conversions if not isinstance(c, RoutedConverter)]
        return [*ours, *self.host.update_weight_conversions(rest, model)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """FP8 weights and scales arrive as they are stored; what is multiplied out is cast by its op."""
        if isinstance(converter, RoutedConverter):
            return None
        target = converter.target_patterns[0]
        module, _, role = target.rpartition(".")
        if self.layout is not None and module in self.layout.kept and role in (WEIGHT, WEIGHT_SCALE, INPUT_SCALE):
            return None
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def plan(
        self,
        model: PreTrainedModel,
        conversions: Sequence[WeightTransform],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        **options: Any,
    ) -> Layout:
        """Plan what `checkpoint`, which is dense, is to become (`plan_quantization`), and how it is laid out on `model`."""
        self._host_conversions = list(conversions)
        self.planned, self.layout = plan_quantization(
            model, conversions, checkpoint, self.quantization_config, dtype=dtype, **options
        )
        (logger.warning if self.planned.reasons or self.planned.unmatched else logger.info)(self.planned.describe())
        return self.layout

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is quantized while it is loaded: it arrives in the model's dtype."""
        if self.planned is None or self.layout is None:
            return False
        targets = {stack.target for plan in self.layout.experts.values() for stack in plan.stacks}
        return param_name in targets or param_name.removesuffix(f".{WEIGHT}") in self.layout.kept

    def get_quantize_ops(self) -> AsItIs:
        return AsItIs()

    @property
    def compute_device(self) -> torch.device:
        """Where the model will compute."""
        return compute_device(self._device_map)

    def look_at(
        self,
        model: PreTrainedModel,
        conversions: Sequence[WeightTransform],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device_map: Any = None,
    ) -> Layout:
        """Change `model`, on the meta device, as loading `checkpoint` would, by its headers alone; nothing is read."""
        self._host_conversions, self._dtype, self._read_values = list(conversions), dtype, False
        self._device_map = device_map
        self._lay_out(model, conversions, checkpoint)
        assert self.layout is not None
        return self.layout

    def _lay_out(self, model: PreTrainedModel, conversions: Sequence[WeightTransform], checkpoint: Checkpoint) -> None:
        config = self.quantization_config
        because = self._why_dense()
        if config.scheme is not None:
            layout = self.plan(model, conversions, checkpoint, self._dtype, use_kernels=self._use_kernels)
        else:
            layout = lay_out(
                model, conversions, checkpoint, config,
                dense_because=because, experts_because=partial(self._why_dense_experts, because),
                use_kernels=self._use_kernels, dtype=self._dtype, read_values=self._read_values,
            )  # fmt: skip
        self.layout = layout
        if layout.saves_fp8(because):
            because = None
        self._dense_because = because
        for name, weight in layout.kept.items():
            dtypes = {role: TORCH_DTYPES[name] for role, name in weight.dtypes.items()}
            swap_linear(
                model, name, weight.scheme, scale_dtype=dtypes[WEIGHT_SCALE], input_scale_dtype=dtypes.get(INPUT_SCALE),
                backend=config.backend,
            )  # fmt: skip
            untie(model, weight.target)
        for plan in layout.experts.values():
            swap_experts(
                model, plan.name, plan.first.projection, plan.second.projection,
                interleaved=plan.interleaved, scale_dtypes=plan.scale_dtypes, backend=config.backend,
            )  # fmt: skip
        in_experts = {stack.target for plan in layout.experts.values() for stack in plan.stacks}
        dense = [w.module for w in layout.scan.weights if w.target and w.module not in {*layout.kept, *in_experts}]
        merged = [w for w in layout.scan.host if w.pattern is not None]
        dense += [name for w in merged for name in (w.name, w.renamed[w.primary].rpartition(".")[0])]
        self._dense = dense
        if len(merged) < len(layout.scan.host) and not config.dequantize:
            packed = any(w.dtypes.get(WEIGHT) not in DENSE_DTYPES for w in layout.scan.host)
            self.host = CompressedTensorsHfQuantizer(config.for_host(ignore=dense, compressed=packed))
            self.host.validate_environment()
            self.host._process_model_before_weight_loading(model)
        if (because is None or self.host is not None) and self._read_values:
            self._carry(checkpoint, layout)
        elif not config.dequantize:
            config.dequantize = True  # all of it: what is saved is a plain dense model
        # Tensors known to be of no use to the model are no news in the loading report.
        silent = {f"^{name.replace('.', chr(92) + '.')}$" for name in layout.passengers}
        if silent:
            model._keys_to_ignore_on_load_unexpected = (model._keys_to_ignore_on_load_unexpected or set()) | silent
        self.update_parallel_plan(model, model.tp_plan)
        self.update_parallel_plan(model, model.ep_plan)
        notes = {w.module: (w.scheme.describe(), layout.reasons.get(w.module, "")) for w in layout.scan.weights if w.target}
        setattr(model, NOTES, notes)
        self._say(because, layout)

    def _why_dense(self) -> str | None:
        """The reason why every FP8 weight is multiplied out while loading, None if they stay in FP8."""
        config = self.quantization_config
        if config.dequantize:
            return "dequantize=True"
        if config.backend != "auto" or config.scheme is not None:
            return None
        device = self.compute_device
        reason = why_not_kept(device, self._dtype)
        return None if reason is None else f"backend='auto' on {device.type}: {reason}"

    def _why_dense_experts(self, because: str | None, scheme: Scheme) -> str | None:
        """The same of merged experts of a scheme, for which `experts` has the last word."""
        config = self.quantization_config
        if config.dequantize or config.experts == "fp8":
            return because if config.dequantize else None
        if config.experts == "dequantize" or config.backend == "int8":
            return because or ("experts='dequantize'" if config.experts == "dequantize" else "backend='int8' is for Linears")
        device = self.compute_device
        reason = why_not_kept_experts(device, self._dtype, scheme)
        where = f"experts='auto' on {device.type}, where no kernel gains from experts in FP8"
        return because or (None if reason is None else f"{where}: {reason}")

    def _carry(self, checkpoint: Checkpoint, layout: Layout) -> None:
        """Take along the tensors that no module uses, and those that the host's modules would hold in another dtype."""
        tensors = checkpoint.read(list(layout.passengers.values()))
        self.passengers = {name: tensors[key] for name, key in layout.passengers.items()}
        if self._dense_because is not None:
            return  # what is left is a checkpoint of the host's, written as it does
        cast = {
            weight.renamed[role]: weight.keys[role]
            for weight in layout.scan.host
            for role, dtype in weight.dtypes.items()
            if dtype in DENSE_DTYPES and TORCH_DTYPES[dtype] != self._dtype and weight.pattern is None
        }
        tensors = checkpoint.read(list(cast.values()))
        self._host_scales = {name: tensors[key] for name, key in cast.items()}

    def _say(self, because: str | None, layout: Layout) -> None:
        if self.planned is not None:
            slow = why_not_kept(self.compute_device, self._dtype)
            if slow and self.quantization_config.backend == "auto":
                logger.warning(
                    f"hf_fp8: what was just quantized stays in FP8, inputs rounded, on {self.compute_device.type} too, which "
                    f"is slow ({slow}). Saved and loaded again it runs as suits the device; backend='weight_only' is faster"
                )
            return
        merged = any(weight.is_expert for weight in layout.scan.weights)
        if because is not None and layout.dense and because != "dequantize=True":
            logger.warning(
                f"hf_fp8: {sum(bool(w.target) for w in layout.scan.weights)} FP8 weights are dequantized to {self._dtype} "
                f"while loading ({because}), and the model saves as a plain dense one. "
                "FP8Config(backend='weight_only') or 'scaled_mm' keeps Linears in FP8; backend='int8' is the fast one on CPUs."
                + (f" {KEEP_EXPERTS}" if merged else "")
            )
        elif because is None and layout.reasons:
            saved = "saved dense" if self.quantization_config.backend == "int8" else "written back in FP8"
            hint = f" {KEEP_EXPERTS}" if any("experts='auto'" in reason for reason in layout.reasons.values()) else ""
            logger.warning(f"hf_fp8: parameters held in {self._dtype} and {saved}: {by_reason(layout.reasons)}.{hint}")
        if self.quantization_config.experts == "fp8" and not merged:
            logger.warning(
                "hf_fp8: experts='fp8' was asked for, but the checkpoint has no experts that the model holds merged."
            )
        if layout.scan.cache and because is None:
            logger.warning(
                "hf_fp8: the checkpoint's KV-cache scales are kept and written back, but not applied: "
                "the cache stays in the dtype of the model."
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.layout is not None and self.layout.broken:
            raise ScaleError("; ".join(self.layout.broken))
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.freeze()
                module.awaits_calibration = self.planned is not None and module.has_static_input
                module.made_of = module.made_of or self._dtype
                if isinstance(module, FP8Linear):
                    module.backward = self.quantization_config.backward
            elif (weight := module._parameters.get(WEIGHT)) is not None and weight.dtype == FP8:
                raise UnsupportedError(
                    f"a {type(module).__name__} of shape {tuple(weight.shape)} holds FP8 codes and no scale: its outputs would "
                    "be wrong. Load with FP8Config(dequantize=True), and please report the model"
                )
        if self.quantization_config.backend == "int8" and self.layout is not None:
            self._to_int8(model, self.layout)
        let_siblings_share(model)
        if self.layout is not None and self.layout.experts:
            model._weight_conversions = for_saving(model._weight_conversions)
        if self._dense_because is not None and self.layout is not None:
            model._weight_conversions = self._native_conversions()
            if self.host is None:
                remember(model.config, self.quantization_config)
            else:
                model.config.quantization_config = self.quantization_config.without_fp8_groups(self._dense)
        return model

    def _to_int8(self, model: PreTrainedModel, layout: Layout) -> None:
        """Re-quantize what stayed in FP8, and see to it that what is saved says so: int8 Linears, all else dense."""
        for module in model.modules():
            if isinstance(module, FP8Linear):
                module.requantize_int8()
        # By the files' own names, too: of experts that the model merges, others look for each one.
        merged = {any_number(weight.name) for weight in layout.scan.weights if weight.pattern is not None}
        self.quantization_config.become_int8([*self._dense, *sorted(merged)])
        model._weight_conversions = self._conversions_of_dense_experts(layout)
        remember(model.config, self.quantization_config)
        layout.dense.clear()  # nothing is written back in FP8
        layout.scales.clear()
        gone = tuple(f".{role}" for role in ZERO_POINTS)
        self.passengers = {name: tensor for name, tensor in self.passengers.items() if not name.endswith(gone)}

    def _native_conversions(self) -> list[WeightTransform]:
        """The host's own transforms, for a model that has become dense: what a plain checkpoint of it looks like.

        Renamings only if the files used them, as in the host: what was not renamed is not renamed back.
        """
        return [c for c in self._host_conversions if isinstance(c, WeightConverter) or c.was_used()]

    def _conversions_of_dense_experts(self, layout: Layout) -> list[WeightTransform]:
        """The host's own for a model whose Linears are quantized, and nothing else."""
        return [*self._native_conversions(), *(c for c in layout.conversions if isinstance(c, KeyRenaming))]

    # -- saving and converting back --

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        refuse_unwritable(model)
        if self._dense_because is None and self.layout is not None:
            if self.host is None and is_dense_now(model, self.layout):
                self.dequantize(model)
                return None, {}
            if leave_experts(model, self.quantization_config, self.layout):
                model._weight_conversions = self._conversions_of_dense_experts(self.layout)
            fit_config(model, self.quantization_config, self.layout)
        if not self.passengers and self.host is None:
            return None, {}
        state = dict(model.state_dict())
        if self.host is not None and self.layout is not None:
            recompress(model, state)
            state.update({name: scale for name, scale in self._host_scales.items() if name in state})
        return {**state, **self.passengers}, {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`hf_fp8.dequantize_model`: without a dtype, layers that kept their float weights get those back as they are."""
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        if self.host is not None:
            raise UnsupportedError(
                "model.dequantize(): some of the model's layers are of other formats, which transformers runs; "
                "load it with FP8Config(dequantize=True) instead"
            )
        swap_back(model, dtype, default=model.dtype)
        setattr(model, NOTES, {})
        model._weight_conversions = self._native_conversions()
        remember(model.config, self.quantization_config)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    # A weight's companions, for the host's tensor-parallel plans.
    serialized_names: ClassVar = {WEIGHT: [WEIGHT, WEIGHT_SCALE, INPUT_SCALE]}
