"""Wraps methods of `PreTrainedModel`: loading, saving and resizing. "The host" is transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, modeling_utils
from transformers.distributed.mixin import DistributedMixin
from transformers.distributed.sharding_utils import DtensorShardOperation
from transformers.utils import logging

from ..checkpoint.weight_files import INDEX
from ..errors import MismatchError, UnsupportedError
from ..loading.dtypes import dtype_of
from ..loading.options import current, loading
from ..loading.undeclared import refuse_undeclared
from ..nn.base import holds_codes
from ..nn.linear import QuantizedLinear
from ..nn.swap import copy_hooks, replace_module
from .locks import one_at_a_time, while_changing
from .patches import wrap
from .peft.state import adapters as adapters_on
from .quantizer import FP8HfQuantizer
from .saving import FILE_DTYPES, drop_stale_file, restore_dtypes
from .sharding import expand_plan, slice_and_cat

logger = logging.get_logger(__name__)


def install() -> None:
    """Wrap these methods. Harmless when repeated."""
    wrap(PreTrainedModel, "from_pretrained", from_pretrained)
    wrap(PreTrainedModel, "_load_pretrained_model", load_files)
    wrap(PreTrainedModel, "save_pretrained", save_pretrained)
    wrap(PreTrainedModel, "resize_token_embeddings", resize_token_embeddings)
    wrap(modeling_utils, "local_torch_dtype", local_torch_dtype)
    wrap(DistributedMixin, "_expand_parallel_plan", expand_plan)
    wrap(DtensorShardOperation, "_slice_and_cat", slice_and_cat)
    wrap(DistributedMixin, "gather_sharded_state_dict_for_save", gather_for_save)


def from_pretrained(host: Any, cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.from_pretrained`, one model at a time in a process; `loading` keeps arguments for the quantizer."""
    with one_at_a_time(), loading(pretrained_model_name_or_path, kwargs):
        try:
            return host(cls, pretrained_model_name_or_path, *args, **kwargs)
        except RuntimeError as error:
            if broken := current().broken:
                raise MismatchError("; ".join(broken)) from error
            raise


@contextmanager
def local_torch_dtype(host: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """The host's block with another default dtype, in which it builds models (also `from_config`): one thread at a time."""
    with while_changing(), host(*args, **kwargs):
        yield


def load_files(
    host: Any, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """`PreTrainedModel._load_pretrained_model`; raises for codes (stored 8-bit values) whose scales would not be loaded."""
    quantizer = load_config.hf_quantizer
    if isinstance(quantizer, FP8HfQuantizer) and (found := quantizer.sharded_sources(model)) is not None:
        state_dict, conversions = found
        load_config = replace(load_config, weight_mapping=conversions)
    if checkpoint_files and state_dict is None and not isinstance(quantizer, FP8HfQuantizer):
        method = None if quantizer is None else quantizer.quantization_config.quant_method
        refuse_undeclared(model, checkpoint_files, load_config.weight_mapping or [], getattr(method, "value", method))
    return host(model, state_dict, checkpoint_files, load_config, *args, **kwargs)


def gather_for_save(host: Any, self: Any, model_to_save: Any, state_dict: Any, layout: Any, **kwargs: Any) -> Any:
    """`gather_sharded_state_dict_for_save`; the state dict that `FP8HfQuantizer` makes has been gathered already."""
    if isinstance(getattr(model_to_save, "hf_quantizer", None), FP8HfQuantizer):
        return state_dict if layout is None or kwargs.get("save_on_this_rank", True) else {}
    return host(self, model_to_save, state_dict, layout, **kwargs)


def save_pretrained(host: Any, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.save_pretrained`. Raises UnsupportedError for a model of which only a part was quantized, since its
    config does not describe the codes, and for a model with adapters, since they change the names of layers.

    If a model was dequantized, tensors that the host holds in a wider dtype than the rest are written in the files' dtype.
    """
    _refuse_unsavable(self, kwargs)
    dtypes, is_given = vars(self).get(FILE_DTYPES), kwargs.get("state_dict") is not None or len(args) > 1
    if dtypes and getattr(self, "hf_quantizer", None) is None and not is_given:
        kwargs["state_dict"] = self.state_dict()
        restore_dtypes(self, kwargs["state_dict"], dtypes, beyond=dtype_of(self))
    quantizer = getattr(self, "hf_quantizer", None)
    if not isinstance(quantizer, FP8HfQuantizer):
        saved = host(self, save_directory, *args, **kwargs)
        _drop_stale_index(Path(save_directory))
        if not is_given:  # else nobody knows what is saved: ModelOpt writes its file first, and then codes
            drop_stale_file(Path(save_directory), None)
        return saved
    with quantizer.saving(Path(save_directory)):
        saved = host(self, save_directory, *args, **kwargs)
        _drop_stale_index(Path(save_directory))
        is_dense = getattr(self.config, "quantization_config", None) is None
        drop_stale_file(Path(save_directory), None if is_dense else quantizer.quantization_config.spec)
    return saved


def _refuse_unsavable(model: Any, options: dict[str, Any]) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None and holds_codes(model):
        raise UnsupportedError(
            f"{type(model).__name__} has quantized layers that its config does not describe (only a part of it was quantized, "
            "or it was loaded by load_quantized): their codes would be saved as values. Quantize the whole model, with targets "
            "or a filter_fn that select the part; or call hf_fp8.dequantize_model first"
        )
    if options.get("distributed_checkpoint") and isinstance(quantizer, FP8HfQuantizer):
        raise UnsupportedError(
            "distributed_checkpoint=True writes parts of tensors under the names of the model, which transformers does not "
            "load for quantized models: leave it out, and the first process writes the checkpoint"
        )
    adapter = adapters_on(model)
    if adapter is not None and quantizer is not None and not getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            f"{adapter} has an adapter, which a checkpoint of the model cannot contain: save the adapters "
            "(PeftModel.save_pretrained), or save the model that merge_and_unload() returns"
        )
    if options.get("save_original_format", True) is False and isinstance(quantizer, FP8HfQuantizer):
        layout = quantizer.layout
        if layout is not None and (layout.dense or layout.experts or quantizer.unplaced.keys):
            raise UnsupportedError(
                "save_original_format=False skips the conversions that write weights back in FP8, which this model needs: "
                "leave it at True, or call model.dequantize() first to save a dense model"
            )


def _drop_stale_index(folder: Path) -> None:
    """Remove an index that an earlier, sharded save left next to the single file that was just written: its shards are
    deleted, and readers could not tell which of the two is the checkpoint."""
    index = folder / INDEX
    if not (folder / "model.safetensors").exists() or not index.exists():
        return
    try:
        files = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if not any((folder / str(file)).exists() for file in files):
        index.unlink(missing_ok=True)  # another process of a sharded model may have done it


def resize_token_embeddings(host: Any, self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.resize_token_embeddings`; first dequantizes a quantized output embedding, as new rows have no scale."""
    embedding = self.get_input_embeddings()
    resized = new_num_tokens is not None and new_num_tokens != getattr(embedding, "num_embeddings", None)
    if resized or args or kwargs.get("pad_to_multiple_of") is not None:
        _make_head_dense(self)
    return host(self, new_num_tokens, *args, **kwargs)


def _make_head_dense(model: Any) -> None:
    head = model.get_output_embeddings()
    if not isinstance(head, QuantizedLinear):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    new = head.to_linear(dtype := dtype_of(model))
    copy_hooks(head, new)
    replace_module(model, name, new)
    logger.warning(f"hf_fp8: {name} is made dense ({dtype}) because it is resized; it is saved dense, and added to `ignore`")
