"""FP8HfQuantizer: the HfQuantizer for compressed-tensors checkpoints with FP8 groups. "The host" is transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import CompressedTensorsConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import logging

from ..checkpoint.reader import DENSE_DTYPES, TORCH_DTYPES, Checkpoint
from ..checkpoint.stored_weight import ZERO_POINTS, check_host_shapes
from ..checkpoint.weight_files import find_weight_files
from ..errors import ConfigError, MissingTensorError, ScaleError, UnsupportedError, first
from ..formats.code_types import E5M2, FP8
from ..formats.storage import INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from ..loading import options as load_options
from ..loading.apply import apply_layout
from ..loading.conversions import KeyRenaming, RoutedConverter, build_conversions, for_saving
from ..loading.dtypes import dtype_of
from ..loading.extra_tensors import Unplaced, any_number, belong_to, by_pattern, keep_names
from ..loading.facts import ModelFacts
from ..loading.key_map import KeyMap, plain_weight
from ..loading.layout import NOTES, Layout
from ..loading.matching import match_checkpoint
from ..loading.ops import NoOp
from ..loading.quantization_plan import Choose, Plan, plan_quantization
from ..nn import dense
from ..nn.base import QuantizedModule
from ..nn.linear import QuantizedLinear
from ..nn.swap import let_siblings_share, swap_back, untie_what_differs
from . import pipeline, sharding
from .config import FP8Config
from .load_log import report, report_planned
from .placement import compute_device, policy_of, quantizes_inputs
from .saving import (
    FILE_DTYPES,
    fit_config,
    is_dense_now,
    leave_experts,
    modules_of_host,
    recompress,
    refuse_unwritable,
    reopen,
    restore_dtypes,
    warn_of_readers,
    write_file_beside,
)

logger = logging.get_logger(__name__)


class FP8HfQuantizer(HfQuantizer):  # type: ignore[misc]
    """HfQuantizer for FP8 compressed-tensors checkpoints; groups of other formats go through the host's quantizer.

    The model is changed in `update_weight_conversions`, not in `preprocess_model`: only there are all renamings of the loader
    known, including the user's `key_mapping`, and so the parameter that each tensor is loaded into.
    """

    quantization_config: FP8Config

    def __init__(self, quantization_config: FP8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layout: Layout | None = None
        self.host: CompressedTensorsHfQuantizer | None = None
        self.extra: dict[str, torch.Tensor] = {}
        self.unplaced = Unplaced(Checkpoint([]), {})
        self._host_scales: dict[str, torch.Tensor] = {}
        self._files: list[str] = []
        self._device_map: Any = None
        self._use_kernels = False
        self._dtype = torch.bfloat16
        self._dense_because: str | None = None
        self._host_conversions: list[WeightTransform] = []
        self.conversions: list[WeightTransform] = []  # load and save as `layout` says
        self.planned: Plan | None = None  # set when quantizing while loading
        self.saving_to: Path | None = None  # the folder that is being written
        self._read_values = True
        self._is_sharded = False

    # -- hooks before and after loading --

    def validate_environment(self, *args: Any, weights_only: bool = True, **kwargs: Any) -> None:
        if not weights_only:
            raise UnsupportedError("weights_only=False lets a pickled checkpoint execute code; leave it at True")

    def update_attn_implementation(self, config: Any) -> Any:
        """Checks that it is unambiguous which files are the checkpoint. Changes nothing of attention: this is the last hook
        before the host resolves the files."""
        options = load_options.current()
        if options.folder is not None:
            explicit = getattr(config, "transformers_weights", None)
            found = find_weight_files(
                options.folder, variant=options.variant, use_safetensors=options.use_safetensors, explicit=explicit
            )
            if found is None:
                raise MissingTensorError(
                    f"{options.folder} holds no weights: no model.safetensors, no index, no pytorch_model.bin"
                )
        return super().update_attn_implementation(config)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Without a dtype in config.json the host uses that of the first tensor in the files, which may hold codes."""
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise UnsupportedError(
                "hf_fp8 reads FP8 checkpoints only from files, because it checks them against their config before it loads "
                "anything; save the state dict with its config and load the folder"
            )
        self._files, self._device_map = list(files), kwargs.get("device_map")
        self._use_kernels = bool(kwargs.get("use_kernels"))
        self._dtype = dtype or torch.get_default_dtype()
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Skips the host's swap of Llama-4's experts for a list of Linears: here they are merged, as in any other family."""

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        if self.layout is None:
            self._host_conversions = list(weight_conversions)
            checkpoint = Checkpoint(self._files)
            dtypes = {info.dtype for info in checkpoint.tensors.values()}
            if self.quantization_config.of_another_load and not self.quantization_config.spec.storages & dtypes:
                if "I8" in dtypes:
                    raise ConfigError(
                        "the `config` that was passed is of a model loaded from FP8, but the files hold int8 codes, which it "
                        "does not describe: leave `config` out"
                    )
                self.quantization_config.dequantize = True  # the files are a dense checkpoint
                return list(weight_conversions)
            self._lay_out(model, weight_conversions, checkpoint)
        assert self.layout is not None
        if self.host is None:
            return list(self.conversions)
        ours = [c for c in self.conversions if isinstance(c, RoutedConverter)]
        rest = [c for c in self.conversions if not isinstance(c, RoutedConverter)]
        return [*ours, *self.host.update_weight_conversions(rest, model)]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """FP8 weights and scales keep the dtype of the files; dequantized weights are cast by their op."""
        if isinstance(converter, RoutedConverter):
            return None
        target = converter.target_patterns[0]
        module, _, role = target.rpartition(".")
        if self.layout is not None and module in self.layout.kept and role != "bias":
            return None
        return dtype  # also for integers, as the host does without a quantizer

    def plan(
        self,
        model: PreTrainedModel,
        conversions: Sequence[WeightTransform],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        *,
        cast: bool = True,
        choose: Choose | None = None,
    ) -> Layout:
        """Plan how `checkpoint`, which is dense, is quantized (`plan_quantization`), and its layout for `model`.

        dtype: the model's. cast: whether weights are cast to it before they are quantized.
        """
        self._host_conversions = list(conversions)
        config = self.quantization_config
        facts = ModelFacts.of(model, dtype, use_kernels=self._use_kernels)
        self.planned, self.layout = plan_quantization(
            facts, conversions, checkpoint, config.spec,
            dense_experts=config.experts == "dequantize", cast_to=dtype if cast else None, choose=choose,
        )  # fmt: skip
        config.spec = self.planned.spec
        self.conversions = build_conversions(self.layout, conversions)
        is_news = self.planned.reasons or self.planned.unmatched or self.planned.torn
        (logger.warning if is_news else logger.info)(self.planned.describe())
        return self.layout

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is quantized while it is loaded: it is read in the model's dtype."""
        if self.planned is None or self.layout is None or self._is_sharded:
            return False
        targets = {stack.target for plan in self.layout.experts.values() for stack in plan.stacks}
        return param_name in targets or plain_weight(param_name).removesuffix(f".{WEIGHT}") in self.layout.kept

    def sharded_sources(self, model: PreTrainedModel) -> tuple[dict[str, Any], list[WeightTransform]] | None:
        """What the host loads a sharded model from, instead of the files and its conversions; None for any other model."""
        if self.layout is None or not sharding.is_sharded(model):
            return None
        self._is_sharded = True
        return sharding.sources(model, self.layout, self._files, self._dtype, self.conversions, as_int8=self._is_int8)

    @property
    def _is_int8(self) -> bool:
        return bool(self.quantization_config.backend == "int8")

    def get_quantize_ops(self) -> NoOp:
        return NoOp()

    @property
    def compute_device(self) -> torch.device:
        """The device on which the model will compute."""
        return compute_device(self._device_map)

    def dry_run(
        self,
        model: PreTrainedModel,
        conversions: Sequence[WeightTransform],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device_map: Any = None,
    ) -> Layout:
        """Change `model`, on the meta device, as loading `checkpoint` would. Reads only headers."""
        self._host_conversions, self._dtype, self._read_values = list(conversions), dtype, False
        self._device_map = device_map
        self._lay_out(model, conversions, checkpoint)
        assert self.layout is not None
        return self.layout

    def _lay_out(self, model: PreTrainedModel, conversions: Sequence[WeightTransform], checkpoint: Checkpoint) -> None:
        """Match the checkpoint with the model, and replace modules of the model by those that will hold it."""
        config = self.quantization_config
        policy = policy_of(config, self.compute_device, self._dtype, read_values=self._read_values)
        if config.scheme is not None:
            layout = self.plan(model, conversions, checkpoint, self._dtype)
        else:
            facts = ModelFacts.of(model, self._dtype, use_kernels=self._use_kernels)
            keymap = KeyMap.of(facts, conversions, checkpoint.tensors)
            layout = self.layout = match_checkpoint(facts, keymap, checkpoint, config.spec, policy)
            config.spec = config.spec.settled(layout.scan.groups, layout.scan.all_dense)
            self.conversions = build_conversions(layout, conversions)
        self._dense_because = None if layout.saves_fp8(policy.dense_because) else policy.dense_because
        apply_layout(model, layout, backend=config.backend, needs_input_scales=self.planned is not None)
        if self._is_int8 and sharding.will_shard(model):
            for name in layout.kept:  # elsewhere they become int8 when they are loaded
                model.get_submodule(name).expect_int8()
        self.host = None if config.dequantize else self._host_quantizer(model, layout)
        if self.host is not None and sharding.will_shard(model):
            raise UnsupportedError(
                f"{first(sorted(name for names in modules_of_host(layout).values() for name in names))} are in formats that "
                "transformers runs, and it cannot shard those (tp_size, ep_size, fsdp_size): load with "
                "FP8Config(dequantize=True), or with a device_map"
            )
        packed = [weight.name for weight in layout.scan.weights if weight.target and weight.scheme.weight.packed]
        if packed and sharding.will_shard(model) and not config.dequantize:
            raise UnsupportedError(
                f"{first(packed)} are packed, several codes in each element, and hf_fp8 cannot shard those over processes yet "
                "(tp_size, ep_size, fsdp_size): load with FP8Config(dequantize=True), or with a device_map"
            )
        carried = self._dense_because is None and config.backend != "int8" and belong_to(model, self._files)
        if (self._dense_because is None or self.host is not None) and self._read_values:
            self._carry(checkpoint, layout, layout.unplaced if carried else {})
        if self._dense_because is not None and self.host is None:
            config.dequantize = True  # nothing stays quantized: it is saved as a plain dense model
        # The loading report does not list tensors that are kept for saving.
        if silent := by_pattern([*layout.extra, *(layout.unplaced if carried else ())]):
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *silent}
        self.update_parallel_plan(model, model.tp_plan)
        self.update_parallel_plan(model, model.ep_plan)
        notes = {w.module: (w.scheme.describe(), layout.reasons.get(w.module, "")) for w in layout.scan.weights if w.target}
        setattr(model, NOTES, notes)
        if self.planned is not None:
            report_planned(config, self.compute_device, self._dtype)
        else:
            quantizes = quantizes_inputs(config, self.compute_device)
            report(config, layout, self._dtype, self._dense_because, carried, quantizes)

    def _host_quantizer(self, model: PreTrainedModel, layout: Layout) -> CompressedTensorsHfQuantizer | None:
        """The host's quantizer for weights of other formats, after it has created their modules; None if there are none."""
        modules = modules_of_host(layout)
        if all(weight.pattern is not None for weight in layout.scan.host):
            return None  # weights that are merged into one parameter are dequantized
        packed = any(w.dtypes.get(WEIGHT) not in DENSE_DTYPES for w in layout.scan.host)
        host = CompressedTensorsHfQuantizer(
            CompressedTensorsConfig(**self.quantization_config.spec.for_host(modules, compressed=packed))
        )
        host.validate_environment()
        host._process_model_before_weight_loading(model)
        check_host_shapes(layout.scan.host, model.state_dict())
        return host

    def _carry(self, checkpoint: Checkpoint, layout: Layout, unplaced: dict[str, str]) -> None:
        """Keep for saving: tensors that no module holds, and those that the host's modules would hold in another dtype."""
        self.unplaced = Unplaced(checkpoint, unplaced)
        tensors = checkpoint.read(list(layout.extra.values()))
        self.extra = {name: tensors[key] for name, key in layout.extra.items()}
        if self._dense_because is not None:
            return  # the remaining quantized layers are the host's, and saved by it
        cast = {
            weight.renamed[role]: weight.keys[role]
            for weight in layout.scan.host
            for role, dtype in weight.dtypes.items()
            if dtype in DENSE_DTYPES and TORCH_DTYPES[dtype] != self._dtype and weight.pattern is None
        }
        tensors = checkpoint.read(list(cast.values()))
        self._host_scales = {name: tensors[key] for name, key in cast.items()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.layout is not None and (broken := sharding.of_all(model, self.layout.broken)):
            raise ScaleError("; ".join(broken))
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.freeze()
                module.needs_calibration = self.planned is not None and module.has_static_input
                if self.planned is None and not self.pre_quantized:
                    module.see_calibration()
                module.original_dtype = module.original_dtype or self._dtype
                if isinstance(module, QuantizedLinear):
                    module.backward = self.quantization_config.backward
            elif (weight := module._parameters.get(WEIGHT)) is not None and weight.dtype in (FP8, E5M2):
                raise UnsupportedError(
                    f"a {type(module).__name__} of shape {tuple(weight.shape)} holds FP8 codes without a scale: its outputs "
                    "would be wrong. Load with FP8Config(dequantize=True), and please report the model"
                )
        if self._is_sharded:
            model._weight_conversions = sharding.used(self.conversions)
        if self._is_int8 and self.layout is not None:
            self._to_int8(model, self.layout)
        pipeline.send_floats(model)
        let_siblings_share(model)
        untie_what_differs(model)
        if self._dense_because is None:
            dense.adopt(model)
        if self._dense_because is None and self.layout is not None:
            model._weight_conversions = for_saving(model._weight_conversions)
        else:
            # Also for a checkpoint that turned out to be dense: the host has dropped them with its config (from 5.24 on).
            model._weight_conversions = self._native_conversions()
        if self._dense_because is not None and self.layout is not None:
            setattr(model, FILE_DTYPES, self.layout.file_dtypes)
            if self.host is not None:
                left = self.quantization_config.spec.host_part(self.layout.dense_modules)
                model.config.quantization_config = FP8Config(experts=self.quantization_config.experts, checkpoint=left)
        return model

    def _to_int8(self, model: PreTrainedModel, layout: Layout) -> None:
        """Re-quantize FP8 Linears to int8, and update what is saved and its config: int8 Linears, all else dense."""
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.requantize_int8()
        # The files' names, too: other readers look up each of the experts that the model merges.
        merged = {f"re:{any_number(weight.name)}" for weight in layout.scan.weights if weight.pattern is not None}
        self.quantization_config.spec = self.quantization_config.spec.as_int8([*layout.dense_modules, *sorted(merged)])
        model._weight_conversions = self._conversions_of_dense_experts()
        layout.dense.clear()  # nothing is written back in FP8
        layout.scales.clear()
        gone = tuple(f".{role}" for role in ZERO_POINTS)
        self.extra = {name: tensor for name, tensor in self.extra.items() if not name.endswith(gone)}

    def _native_conversions(self) -> list[WeightTransform]:
        """The host's own transforms, which save a dequantized model as a plain checkpoint.

        Renamings only if the files used them, as in the host: keys that were not renamed are not renamed back.
        """
        return [c for c in self._host_conversions if isinstance(c, WeightConverter) or c.was_used()]

    def _conversions_of_dense_experts(self) -> list[WeightTransform]:
        """Transforms for a model of which only Linears are quantized: the host's own, and renamings of keys."""
        return [*self._native_conversions(), *(c for c in self.conversions if isinstance(c, KeyRenaming))]

    # -- saving and converting back --

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        refuse_unwritable(model)
        if self._dense_because is None and self.layout is not None:
            if self.host is None and is_dense_now(model, self.layout):
                self.dequantize(model)
                return None, {}
            if leave_experts(model, self.quantization_config, self.layout):
                model._weight_conversions = self._conversions_of_dense_experts()
            fit_config(model, self.quantization_config, self.layout, self.unplaced.keys.values())
            if self.saving_to is not None:
                write_file_beside(self.saving_to, self.quantization_config.spec)
        if self.host is not None or (self._dense_because is None and not self.quantization_config.dequantize):
            warn_of_readers(model, self.quantization_config)
        state = sharding.gathered_state(model)
        if self.layout is None:
            return state, {}
        if self.host is not None:
            recompress(model, state, self.layout)
            state.update({name: scale for name, scale in self._host_scales.items() if name in state})
        restore_dtypes(model, state, self.layout.file_dtypes, beyond=dtype_of(model) if self.planned is not None else None)
        extra = {**self.extra, **self.unplaced.read()}
        keep_names(model, extra, self._file_names(self.layout))
        return {**state, **extra}, {}

    @contextmanager
    def saving(self, folder: Path) -> Iterator[None]:
        """Context manager around saving to `folder`. If the model's own files were overwritten, the next save reads what it
        needs from the new ones."""
        self.saving_to = folder
        try:
            yield
        finally:
            self.saving_to = None
        if self.layout is not None and any(Path(file).parent.resolve() == folder.resolve() for file in self._files):
            self._files = reopen(folder, (self.unplaced.checkpoint, self.layout.source)) or self._files

    def _file_names(self, layout: Layout) -> dict[str, str]:
        """Name under which a tensor is passed to the saver -> key in the files, for all but dense tensors."""
        weights = [w for w in [*layout.scan.weights, *layout.scan.host] if w.target and w.part is None]
        named = {w.saved[role]: key for w in weights for role, key in w.keys.items()}
        return named | layout.extra | self.unplaced.keys

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`hf_fp8.dequantize_model`: without a dtype, layers that kept their float weights get them back unchanged."""
        if self.host is not None:
            raise UnsupportedError(
                "model.dequantize(): some layers have other formats than FP8, which transformers runs; "
                "load the model with FP8Config(dequantize=True) instead"
            )
        swap_back(model, dtype, default=dtype_of(model))
        setattr(model, NOTES, {})
        if self.layout is not None:
            setattr(model, FILE_DTYPES, self.layout.file_dtypes)
        self.remove_quantization_config(model)
        model._weight_conversions = self._native_conversions()  # the host may have dropped them with the config
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    # The tensors that belong to a weight, for the host's tensor-parallel plans.
    serialized_names: ClassVar = {WEIGHT: [WEIGHT, WEIGHT_SCALE, INPUT_SCALE]}
