"""`quality(reference, quantized, data)`: the quantization error of each layer (weights, outputs), and perplexity."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..formats import numerics
from ..formats.storage import format_of
from ..kernels import torch_grouped as grouped_mm
from ..nn.base import QuantizedModule
from ..nn.expert_weights import rows_as_held, weights_of
from ..nn.experts import QuantizedExperts
from ..nn.experts_layout import Projection
from ..nn.linear import QuantizedLinear
from ..nn.swap import submodule
from .outputs import Layer, Outputs, Pair, Sums, compare_outputs, outputs_against_originals
from .report import QualityReport
from .rows import Row, Rows, rank
from .running import Progress, check_text, evaluating, perplexity


def quality(
    reference: nn.Module | None,
    quantized: nn.Module,
    data: Any = None,
    *,
    names: Iterable[str] | Mapping[str, str] | None = None,
    text: torch.Tensor | None = None,
    window: int = 512,
    accumulated: bool = True,
    progress: Progress | None = None,
) -> QualityReport:
    """Measure how far each QuantizedLinear and QuantizedExperts in `quantized` differs from its float layer.

    Args:
        reference: the float model, on any device and in any dtype; None if the layers kept their float weights
            (`originals="keep"` or "offload"). Layers without a float weight are listed, but not compared.
        quantized: the model with quantized layers.
        data: batches to compare outputs on, an iterable of tensors, tuples or lists (positional arguments) or dicts
            (keyword arguments); or one tensor or dict. Without it only weights are compared. Batches are moved to each
            model's device, their float tensors cast to its dtype.
        names: which layers to compare, by their names in `quantized`; or a mapping from those names to the ones in
            `reference`. By default all, under the same names.
        text: token ids (L,); then both models' `perplexity` on it is measured, in windows of `window` tokens.
        accumulated: also compare outputs within the whole models. This holds the float layers' outputs of one batch.
        progress: called with ("weights", "outputs" or "perplexity", done, total or None).

    What is measured: weights in float64, the quantized ones dequantized; outputs of each layer alone, on the inputs of the
    float model's layer (cast to the quantized model's dtype, and quantized as the scheme says); outputs of each layer in the
    quantized model against those in the float model. Padding counts for layers, not for logits. If `reference` is None,
    a layer's output is compared with that of the float layer on the same input; outputs within the float model and its
    logits are not measured. Models run in evaluation mode without gradients.

    Raises ValueError if there is nothing to compare: no quantized layer, no batch, the same model twice, an unknown name, or
    a layer without a float layer of the same shape.
    """
    if reference is quantized:
        raise ValueError("`reference` and `quantized` are the same model: pass the float one and the quantized one")
    if text is not None:
        check_text(text, window)  # before the layers, which may take hours
    pairs = list(_pairs(reference, quantized, names))
    found = []
    for done, pair in enumerate(pairs, 1):
        found.append((pair, _weights(pair)))
        if progress is not None:
            progress("weights", done, len(pairs))
    outputs = None if data is None else _outputs(reference, quantized, pairs, data, accumulated, progress)
    rows = Rows(row for pair, weights in found for row in _with_outputs(pair, weights, outputs))
    report = QualityReport(rows)
    if outputs is not None:
        report.logits_sqnr, report.tokens = outputs.logits.sqnr, outputs.tokens
        report.kl_divergence = outputs.kl / outputs.tokens if outputs.tokens else None
    if text is not None:
        before = None if reference is None else perplexity(reference, text, window, progress)
        report.perplexity = (before, perplexity(quantized, text, window, progress))
    return report


def _outputs(
    reference: nn.Module | None,
    quantized: nn.Module,
    pairs: list[Pair],
    data: Any,
    accumulated: bool,
    progress: Progress | None,
) -> Outputs:
    if reference is None:
        kept = [pair for pair in pairs if getattr(pair.layer, "original", None) is not None]
        with evaluating(quantized):
            outputs = outputs_against_originals(quantized, kept, data, progress)
    else:
        with evaluating(reference, quantized):
            outputs = compare_outputs(reference, quantized, pairs, data, accumulated, progress)
    if not outputs.batches:
        raise ValueError("`data` has no batch (is it an iterator that was used before?)")
    return outputs


def _pairs(
    reference: nn.Module | None, quantized: nn.Module, names: Iterable[str] | Mapping[str, str] | None
) -> Iterator[Pair]:
    """The quantized layers in the order of the model, each with its float module, whose shapes are checked."""
    layers: dict[str, Layer] = {
        n: m for n, m in quantized.named_modules() if isinstance(m, (QuantizedLinear, QuantizedExperts))
    }
    if not layers:
        raise ValueError(
            "`quantized` has no QuantizedLinear and no QuantizedExperts: is it the second argument, and were its layers kept "
            "in FP8? On a CPU, FP8 checkpoints are dequantized unless loaded with FP8Config(backend='scaled_mm')"
        )
    wanted = dict(names) if isinstance(names, Mapping) else {name: name for name in (layers if names is None else names)}
    unknown = [name for name in wanted if name not in layers]
    if unknown:
        raise ValueError(
            f"`names` has {unknown[0]!r}, which is not a quantized layer; the model has {', '.join(list(layers)[:3])}, ..."
        )
    for name, layer in layers.items():
        if name not in wanted:
            continue
        module = None
        if reference is not None:
            module = submodule(reference, wanted[name])
            if module is None:
                raise ValueError(
                    f"the reference has no layer {wanted[name]!r}, which the quantized model has: if it has another name "
                    "there, pass names={'name in quantized': 'name in reference'}"
                )
            _check(wanted[name], layer, module)
        yield Pair(name, layer, module)


def _check(name: str, layer: Layer, module: nn.Module) -> None:
    """Raises ValueError if `module` is not the float module of a quantized layer."""
    if isinstance(module, QuantizedModule):
        raise ValueError(f"{name} of the reference is a {type(module).__name__}, which is quantized: pass the float model")
    if isinstance(layer, QuantizedExperts):
        for projection in layer.projections:
            n_experts, n, k = projection.shape
            shape = (n_experts, k, n) if layer.layout.is_transposed else (n_experts, n, k)
            _check_weight(f"{name}.{projection.name}", getattr(module, projection.name, None), shape)
        return
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(f"{name} of the reference is a {type(module).__name__}, not a float linear layer")
    # A 1x1 convolution is a linear layer over channels: (N, K, 1, 1).
    ones = (1,) * (module.weight.ndim - 2) if not isinstance(module, nn.Linear) else ()
    _check_weight(name, module.weight, (layer.out_features, layer.in_features, *ones))


def _check_weight(name: str, weight: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"{name} of the reference has no float weight ({kind}): pass the float model")
    if weight.shape != shape:
        raise ValueError(f"{name} has a weight of shape {tuple(weight.shape)} in the reference; the quantized one's is {shape}")


def _weights(pair: Pair) -> list[Row]:
    """The row of a linear, or one for each projection of experts."""
    layer = pair.layer
    if isinstance(layer, QuantizedExperts):
        return [_projection(pair, layer, projection) for projection in layer.projections]
    row = Row(pair.name, pair.name, layer.scheme.describe(), (layer.out_features, layer.in_features))
    weight: Any = layer.original if pair.reference is None else pair.reference.weight
    if weight is None:
        return [dataclasses.replace(row, note="not comparable: its float weight was not kept")]
    if layer.coded.is_meta or weight.is_meta:
        return [dataclasses.replace(row, note="weights not comparable: they are offloaded")]
    sums, weight, scheme = Sums(), weight.detach().reshape(row.shape), layer.scheme.weight
    held, elements = layer.tensors(), numerics.chunk(layer.coded.device)
    for dense, start in format_of(scheme).pieces(held, scheme, layer.in_features, torch.float32, elements):
        sums.add(weight[start : start + len(dense)], dense)
    return [_measured(row, sums)]


def _projection(pair: Pair, experts: QuantizedExperts, projection: Projection) -> Row:
    row = Row(f"{pair.name}.{projection.name}", pair.name, projection.scheme.describe(), projection.shape)
    if pair.reference is None:
        return dataclasses.replace(row, note="not comparable: its float weight was not kept")
    codes, stack = experts.held_codes(projection.name), getattr(pair.reference, projection.name).detach()
    if codes.is_meta or stack.is_meta:
        return dataclasses.replace(row, note="weights not comparable: they are offloaded")
    held = weights_of(experts, projection)
    total, each = Sums(), []
    for number, rows in enumerate(rows_as_held(experts, projection, stack)):
        sums = Sums()
        for dense, first, last in grouped_mm.pieces(held, number, projection.shape[2], torch.float32):
            sums.add(rows[first:last], dense)
        total.merge(sums)
        each.append(sums.sqnr)
    rated = [(rank(value), number) for number, value in enumerate(each) if value is not None]
    worst = min(rated)[1] if rated else None
    measured = _measured(row, total)
    return dataclasses.replace(measured, worst_expert=worst, worst_expert_sqnr=None if worst is None else each[worst])


def _measured(row: Row, sums: Sums) -> Row:
    return dataclasses.replace(
        row, weight_sqnr=sums.sqnr, relative_error=sums.relative_error, largest_error=sums.largest if sums.count else None
    )


def _with_outputs(pair: Pair, weights: list[Row], outputs: Outputs | None) -> list[Row]:
    """The rows of a layer; the output of an experts module has a separate row."""
    if outputs is None:
        return weights
    alone, accumulated = outputs.alone.get(pair.name), outputs.accumulated.get(pair.name)
    unpaired = pair.name in outputs.unpaired
    note = "called differently in the quantized model" if unpaired else ""
    measures: dict[str, Any] = {
        "output_sqnr": None if alone is None else alone.sqnr,
        "accumulated_sqnr": None if accumulated is None or unpaired else accumulated.sqnr,
    }
    if alone is None and not weights[0].note.startswith("not comparable"):
        note = "not called"
    if isinstance(pair.layer, QuantizedExperts):
        if alone is None and pair.reference is None:
            return weights
        schemes = " / ".join(dict.fromkeys(row.scheme for row in weights))
        return [*weights, Row(pair.name, pair.name, schemes, note=note, **measures)]
    noted = "; ".join(part for part in (weights[0].note, note) if part)
    return [dataclasses.replace(weights[0], note=noted, **measures)]
