"""Dense checkpoints that are quantized while loading: numbers to the bit, what is chosen, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from support.build import IDS, differing, error, logits, sqnr, stock_transformers, tensors, tiny_llama, weights_json, write
from support.moe import MOE, TRANSPOSED, causal
from support.quantized_loads import config_of, kept
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import hf_fp8
from hf_fp8 import FP8Config, Granularity, Scheme, TensorScheme
from hf_fp8.checkpoint.group_schemes import write_group
from hf_fp8.checkpoint.quantization_spec import QuantizationSpec
from hf_fp8.errors import CalibrationError, ConfigError, MismatchError
from hf_fp8.formats.code_types import FP8
from hf_fp8.formats.scheme import SCHEMES

NAMES = ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "FP8_WEIGHT_ONLY", "FP8_TENSOR"]
FAMILIES = {**MOE, **TRANSPOSED}
# Blocks of FP8_BLOCK are larger than the matrices of small models: these are not, and do not divide them.
SMALL_BLOCK = Scheme(TensorScheme(Granularity(40, 24)), TensorScheme(Granularity(1, 24), dynamic=True))
GROUP = Scheme(TensorScheme(Granularity(1, 32)))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def scheme_of(scheme: str | Scheme) -> Scheme:
    return SCHEMES[scheme] if isinstance(scheme, str) else scheme


def by_compressed_tensors(weight: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale) of compressed-tensors' own arithmetic, the extremes of each block found one block at a time."""
    rows, cols = weight.shape
    height = rows if granularity.rows == -1 else granularity.rows
    width = cols if granularity.cols == -1 else granularity.cols
    grid = [[weight[r : r + height, c : c + width] for c in range(0, cols, width)] for r in range(0, rows, height)]
    low = torch.stack([torch.stack([block.amin() for block in line]) for line in grid])
    high = torch.stack([torch.stack([block.amax() for block in line]) for line in grid])
    args = QuantizationArgs(**weights_json(granularity))
    scale, _ = calculate_qparams(low, high, args)
    if granularity.is_tensor:
        scale = scale.reshape(1)
    return ct_quantize(weight, scale, None, args, dtype=FP8), scale  # with a zero point, -0.0 would become 0.0


def quantized(path: Path, scheme: Any = "FP8_DYNAMIC", cls: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    asked = {key: options.pop(key) for key in ("targets", "ignore", "experts", "backend") if key in options}
    return cls.from_pretrained(path, quantization_config=FP8Config(scheme=scheme, **asked), **options)


def measure(*models: PreTrainedModel) -> None:
    for model in models:
        if any(getattr(module, "needs_calibration", False) for module in model.modules()):
            with hf_fp8.calibrate(model), torch.no_grad():
                model(IDS, use_cache=False)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense"
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.thinned(4)
@pytest.mark.parametrize("scheme", [*NAMES, SMALL_BLOCK, GROUP], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_compressed_tensors(scheme: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_llama().to(dtype)
    with torch.no_grad():
        source.model.layers[0].mlp.up_proj.weight[3] = 0  # a row of zeros
        source.model.layers[0].mlp.gate_proj.weight.mul_(1e-3)
        source.model.layers[1].mlp.gate_proj.weight[5, 7] = 60.0
    source.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", scheme, dtype=dtype)
    assert len(kept(model)) == 14
    granularity = scheme_of(scheme).weight.granularity
    for name in kept(model):
        layer = model.get_submodule(name)
        codes, scale = by_compressed_tensors(source.get_submodule(name).weight.detach(), granularity)
        assert differing({"q": codes, "s": scale}, {"q": layer.weight.data, "s": layer.weight_scale.data}) == [], name
        assert layer.scheme == scheme_of(scheme)
    measure(model)
    model.save_pretrained(tmp_path / "saved")
    written = tensors(tmp_path / "saved")
    assert differing(written, dict(model.state_dict())) == []


@pytest.mark.usefixtures("no_native")
@pytest.mark.thinned(3)
@pytest.mark.parametrize(("scheme", "dtype"), [
    *((scheme, torch.bfloat16) for scheme in (*NAMES, SMALL_BLOCK)), ("FP8_DYNAMIC", torch.float32), ("FP8", torch.float16)
], ids=str)  # fmt: skip
def test_the_same_as_of_the_loaded_model(scheme: Any, dtype: torch.dtype, dense: Path, tmp_path: Path) -> None:
    one = quantized(dense, scheme, dtype=dtype)
    two = hf_fp8.quantize_model(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype), scheme)
    measure(one, two)
    assert torch.equal(logits(one), logits(two))
    for number, model in enumerate((one, two)):
        model.save_pretrained(tmp_path / str(number))
    assert differing(tensors(tmp_path / "0"), tensors(tmp_path / "1")) == []
    assert (tmp_path / "0" / "config.json").read_text() == (tmp_path / "1" / "config.json").read_text()
    assert QuantizationConfig.model_validate(config_of(tmp_path / "0")).ignore == ["lm_head"]
    # What was saved is what was run; and saved again, it is the same bytes.
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "0", quantization_config=FP8Config(backend="scaled_mm"), dtype=dtype
    )
    assert torch.equal(logits(again), logits(one))
    again.save_pretrained(tmp_path / "2")
    assert differing(tensors(tmp_path / "0"), tensors(tmp_path / "2")) == []
    assert config_of(tmp_path / "0") == config_of(tmp_path / "2")
    reference = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=dtype))
    assert sqnr(logits(one), reference) > 12


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [*DTYPES, "auto"])
def test_weights_are_cast_to_the_dtype_that_was_asked_for(stored: torch.dtype, dtype: Any, tmp_path: Path) -> None:
    source = tiny_llama().to(stored)
    source.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", dtype=dtype)
    into = stored if dtype == "auto" else dtype
    assert model.dtype == into and model.model.norm.weight.dtype == into
    layer = model.model.layers[1].mlp.down_proj
    codes, scale = by_compressed_tensors(source.model.layers[1].mlp.down_proj.weight.detach().to(into), Granularity(1, -1))
    assert differing({"q": codes, "s": scale}, {"q": layer.weight.data, "s": layer.weight_scale.data}) == []
    model.save_pretrained(tmp_path / "saved")
    assert tensors(tmp_path / "saved")["model.layers.1.mlp.down_proj.weight_scale"].dtype == into


EXPERT_NAMES = {
    "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.w[123]",
    "gpt_oss": "model.layers.{}.mlp.experts.{}.(gate|up|down)_proj",
    "llama4": "model.layers.{}.feed_forward.experts.{}.(gate|up|down)_proj",
}  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_WEIGHT_ONLY", "FP8", SMALL_BLOCK], ids=str)
def test_mixtures(family: str, scheme: Any, tmp_path: Path) -> None:
    source = FAMILIES[family]()
    source.save_pretrained(tmp_path / "dense")
    one = quantized(tmp_path / "dense", scheme, type(source))
    two = hf_fp8.quantize_model(type(source).from_pretrained(tmp_path / "dense"), scheme)
    measure(one, two)
    assert torch.equal(causal(one), causal(two)) and sqnr(causal(one), causal(source)) > 9
    for number, model in enumerate((one, two)):
        model.save_pretrained(tmp_path / str(number))
    written = tensors(tmp_path / "0")
    assert differing(written, tensors(tmp_path / "1")) == []
    config = config_of(tmp_path / "0")
    assert config == config_of(tmp_path / "1") and QuantizationConfig.model_validate(config)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    # One set of tensors for each expert, routers and the head dense and in `ignore`, by the files' own names.
    path = EXPERT_NAMES.get(family, "model.layers.{}.mlp.experts.{}.(gate|up|down)_proj")
    found = {name.removesuffix(".weight") for name, t in written.items() if t.dtype == FP8 and "experts." in name}
    layers = {int(re.findall(r"\d+", name)[0]) for name in found}
    assert len(found) == 3 * 4 * len(layers) + sum("shared_experts" in name for name in found)
    for name in found:
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        assert "shared_experts" in name or re.fullmatch(path.format(*numbers), name), name
        scale = written[f"{name}.weight_scale"]
        granularity = scheme_of(scheme).weight.granularity
        shape = (1,) if granularity.is_tensor else granularity.grid(*written[f"{name}.weight"].shape)
        assert scale.shape == shape and scale.dtype == torch.bfloat16, name
        assert (f"{name}.input_scale" in written) == scheme_of(scheme).has_static_input
    routers = {n.removesuffix(".weight") for n in written if re.search(r"\.(gate|router)\.weight$", n)}
    assert routers and set(config["ignore"]) == {"lm_head", *routers}
    assert all(written[f"{name}.weight"].dtype == torch.bfloat16 for name in config["ignore"])
    options: Any = {"quantization_config": FP8Config(experts="fp8", backend="weight_only")}
    kept_again = type(source).from_pretrained(tmp_path / "0", **options)
    if scheme == "FP8_WEIGHT_ONLY":
        assert torch.equal(causal(kept_again), causal(one))
    kept_again.save_pretrained(tmp_path / "2")
    assert differing(written, tensors(tmp_path / "2")) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_of_experts_are_those_of_compressed_tensors(family: str, tmp_path: Path) -> None:
    source = FAMILIES[family]()
    source.save_pretrained(tmp_path / "dense")
    quantized(tmp_path / "dense", SMALL_BLOCK, type(source)).save_pretrained(tmp_path / "saved")
    plain, written, seen = tensors(tmp_path / "dense"), tensors(tmp_path / "saved"), 0
    for name, codes in written.items():
        if codes.dtype != FP8:
            continue
        weight = plain.get(name)
        if weight is None:  # files of gpt-oss and Llama-4 stack the experts, transposed
            stem, number, projection = re.fullmatch(r"(.*)\.(\d+)\.(\w+)_proj\.weight", name).groups()
            rows = plain[f"{stem}.{'down' if projection == 'down' else 'gate_up'}_proj"][int(number)].t()
            if projection != "down" and family == "gpt_oss":
                rows = rows[0 if projection == "gate" else 1 :: 2]
            elif projection != "down":
                rows = rows.chunk(2)[0 if projection == "gate" else 1]
            weight, seen = rows.contiguous(), seen + 1
        wanted, scale = by_compressed_tensors(weight, SMALL_BLOCK.weight.granularity)
        assert differing({"q": wanted, "s": scale}, {"q": codes, "s": written[f"{name}_scale"]}) == [], name
    assert seen == (24 if family in TRANSPOSED else 0)


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize(("options", "quantized_count", "head"), [
    ({}, 14, False), ({"ignore": []}, 15, True), ({"targets": ["Linear", "lm_head"]}, 15, True),
    ({"ignore": "lm_head"}, 14, False),
    ({"targets": "re:.*lm_head$"}, 1, True), ({"ignore": "re:.*mlp"}, 8, False), ({"targets": ["re:.*[qk]_proj$"]}, 4, False),
    ({"ignore": ["re:.*mlp.*", "model.layers.0.self_attn.q_proj"]}, 7, False),
    ({"targets": "model.layers.1.mlp.up_proj"}, 1, False),
    # The head lies beside the model: it has no name that begins with "model.".
    ({"targets": [r"re:model\.(?!embed|norm).*"], "ignore": []}, 14, False),
    ({"targets": ["lm_head"], "ignore": [r"re:model\..*"]}, 1, True),
])  # fmt: skip
def test_targets_and_ignore(options: Any, quantized_count: int, head: bool, dense: Path, tmp_path: Path) -> None:
    model = quantized(dense, **options)
    assert len(kept(model)) == quantized_count and ("lm_head" in kept(model)) == head
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    model.save_pretrained(tmp_path / "saved")
    config = config_of(tmp_path / "saved")
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(config["ignore"]) - {"model.embed_tokens"} == linears - set(kept(model))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=FP8Config(backend="scaled_mm"))
    assert kept(again) == kept(model) and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("targets", [["re:.*"], [r"re:model\..*"], ["Linear", "Embedding"]], ids=str)
def test_stock_reads_what_targets_beyond_linears_made(targets: list[str], dense: Path, tmp_path: Path) -> None:
    """It would look for the scales of embeddings that a target matches and `ignore` does not."""
    model = quantized(dense, "FP8_WEIGHT_ONLY", targets=targets)
    assert len(kept(model)) == 14
    model.save_pretrained(tmp_path / "saved")
    assert "model.embed_tokens" in config_of(tmp_path / "saved")["ignore"]
    with stock_transformers():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        found = logits(stock)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert error(found, logits(wanted)) < 1e-2  # stock computes in bfloat16


def test_heads_beside_the_model_are_no_part_of_it(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "dense")
    for found in (
        quantized(tmp_path / "dense", "FP8_WEIGHT_ONLY", LlamaForSequenceClassification, targets=[r"re:model\..*"]),
        hf_fp8.quantize_model(model, "FP8_WEIGHT_ONLY", targets=[r"re:model\..*"]),
    ):
        assert isinstance(found.score, torch.nn.Linear) and not isinstance(found.score, hf_fp8.QuantizedLinear)
        assert len(kept(found)) == 14


def test_requests_lose_no_group() -> None:
    def asked(scheme: Any) -> list[tuple[str, ...]]:
        return sorted(group.targets for group in QuantizationSpec.asked(scheme, ["Linear"], None).groups)

    q, k = ["re:.*q_proj"], ["re:.*k_proj"]
    assert asked({"FP8_DYNAMIC": q, "fp8_dynamic": k}) == [("re:.*q_proj", "re:.*k_proj")]
    for name in ("group_0", "group_1"):
        assert asked({name: write_group(SCHEMES["FP8_BLOCK"], q), "FP8_DYNAMIC": k}) == [tuple(k), tuple(q)]
        assert asked({"FP8_DYNAMIC": k, name: write_group(SCHEMES["FP8_BLOCK"], q)}) == [tuple(k), tuple(q)]


def test_routers_that_a_target_names(tmp_path: Path) -> None:
    source = MOE["qwen3_moe"]()
    source.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"mlp\.gate"):
        quantized(tmp_path / "dense", targets=["re:.*mlp.gate$"])  # no nn.Linear, and nothing else was asked for


@pytest.mark.usefixtures("no_native")
def test_several_groups(dense: Path, tmp_path: Path) -> None:
    scheme = {"FP8_DYNAMIC": ["re:.*self_attn.*"], SMALL_BLOCK: ["re:.*down_proj$"], "FP8_WEIGHT_ONLY": "Linear"}
    model = quantized(dense, scheme, ignore=["lm_head", "re:.*layers.1.mlp.up_proj"])
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.scheme == SCHEMES["FP8_DYNAMIC"] and layer.mlp.down_proj.scheme == SMALL_BLOCK
    assert layer.mlp.up_proj.scheme == SCHEMES["FP8_WEIGHT_ONLY"]
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    two = hf_fp8.quantize_model(
        AutoModelForCausalLM.from_pretrained(dense), scheme, ignore=["lm_head", "re:.*layers.1.mlp.up_proj"]
    )
    for number, each in enumerate((model, two)):
        each.save_pretrained(tmp_path / str(number))
    assert differing(tensors(tmp_path / "0"), tensors(tmp_path / "1")) == []
    assert config_of(tmp_path / "0") == config_of(tmp_path / "1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "0", quantization_config=FP8Config(backend="scaled_mm"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_projection_of_experts(family: str, tmp_path: Path) -> None:
    source = FAMILIES[family]()
    source.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", "FP8_WEIGHT_ONLY", type(source), targets=["re:.*(down_proj|w2)$", "re:.*q_proj$"])
    model.save_pretrained(tmp_path / "saved")
    written = tensors(tmp_path / "saved")
    assert sqnr(causal(model), causal(source)) > 9 and any(t.dtype == FP8 for t in written.values())


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "mixtral"])
@pytest.mark.parametrize("entry", ["re:.*experts.*", "re:.*layers.0.*experts"], ids=str)
def test_ignored_experts_are_matched(
    family: str, entry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, propagated: None
) -> None:
    """Also those that are in one stack, and stay so."""
    FAMILIES[family]().save_pretrained(tmp_path / "dense")
    with caplog.at_level("WARNING"):
        quantized(
            tmp_path / "dense", "FP8_WEIGHT_ONLY", type(FAMILIES[family]()), ignore=["lm_head", "re:.*(router|gate)$", entry]
        )
        hf_fp8.quantize_model(FAMILIES[family](), "FP8_WEIGHT_ONLY", ignore=["lm_head", "re:.*(router|gate)$", entry])
    assert entry not in caplog.text


def test_ways_to_say_the_same(dense: Path) -> None:
    wanted = logits(quantized(dense))
    group = json.loads(preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).model_dump_json())
    for scheme in ("fp8_dynamic", SCHEMES["FP8_DYNAMIC"], {"FP8_DYNAMIC": ["Linear"]}, {"group_a": group}):
        assert torch.equal(logits(quantized(dense, scheme)), wanted)
    as_dict = AutoModelForCausalLM.from_pretrained(dense, quantization_config={"scheme": "FP8_DYNAMIC"})
    assert torch.equal(logits(as_dict), wanted)


def test_one_config_for_several_loads(dense: Path, tmp_path: Path) -> None:
    config = FP8Config(scheme={"FP8_DYNAMIC": ["re:.*self_attn.*"], "FP8_WEIGHT_ONLY": ["re:.*down_proj"]})
    first = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other", quantization_config=config)
    assert len(kept(other)) == 5
    second = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert torch.equal(logits(first), logits(second))
    assert first.config.quantization_config.to_dict() == second.config.quantization_config.to_dict()
    assert config.checkpoint is None and config.ignore == ()


W2 = {"group": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 2, "type": "int", "strategy": "channel"}}}


@pytest.mark.parametrize(("make", "words"), [
    (lambda: FP8Config(scheme="FP9"), "FP9"), (lambda: FP8Config(scheme=""), "one of"), (lambda: FP8Config(scheme=8), "8"),
    (lambda: FP8Config(scheme="INT8", backend="int8"), "int8"), (lambda: FP8Config(scheme=W2), "2-bit int weights"),
    (lambda: FP8Config(scheme="FP8", dequantize=True), "dequantize=True"), (lambda: FP8Config(targets="Foo"), "pass a scheme"),
    (lambda: FP8Config(scheme="FP8_DYNAMIC", backend="int8"), "int8"), (lambda: FP8Config(ignore=[]), "pass a scheme"),
    (lambda: FP8Config(scheme="FP8", ignore="re:("), "regular expression"), (lambda: FP8Config(scheme={}), "config_groups"),
    (lambda: FP8Config(scheme={"FP8_DYNAMIC": []}), "targets"),
    (lambda: FP8Config(scheme={"FP8_DYNAMIC": ["Linear"], **W2}), "2-bit int weights"),
])  # fmt: skip
def test_what_cannot_be_asked_for(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize("operand", [
    {"weight": TensorScheme(Granularity(1, -1), dynamic=True)},
    {"weight": TensorScheme(Granularity(1, -1)), "input": TensorScheme(Granularity(1, -1))},
], ids=["dynamic weights", "static rows"])  # fmt: skip
def test_schemes_that_there_are_none_of(operand: Any) -> None:
    with pytest.raises(ConfigError):
        FP8Config(scheme=Scheme(**operand))


def test_a_dict_with_a_misspelt_option(dense: Path) -> None:
    with pytest.raises(ConfigError, match="ignores"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config={"scheme": "FP8_DYNAMIC", "ignores": []})


@pytest.mark.parametrize("options", [{"targets": ["nothing"]}, {"targets": "re:.*nothing"}, {"ignore": ["Linear"]}])
def test_nothing_to_quantize(options: Any, dense: Path) -> None:
    with pytest.raises(ConfigError, match="they leave no Linear"):
        quantized(dense, **options)
    with pytest.raises(ConfigError, match="targets"):
        quantized(dense, {"FP8_DYNAMIC": "Linear", "FP8_TENSOR": "re:.*nothing"})


def test_what_is_quantized_already(dense: Path, tmp_path: Path) -> None:
    quantized(dense).save_pretrained(tmp_path / "ours")
    write(tiny_llama(), tmp_path / "fp8")
    for path in (tmp_path / "ours", tmp_path / "fp8"):
        with pytest.raises(ConfigError, match="quantized already"):
            quantized(path)
    text = json.loads((tmp_path / "fp8" / "config.json").read_text())
    text.pop("quantization_config")
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(text))
    with pytest.raises(MismatchError, match=r"_proj\.weight is stored as F8_E4M3.*rounded twice"):
        quantized(tmp_path / "fp8")
    for method in ("gptq", "awq", "bitsandbytes", "fp8", "torchao", "mxfp4"):
        (dense / "config.json").write_text(json.dumps(text | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(ConfigError, match=f"quantized already.*{method}"):
            quantized(dense)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_llama()
    source.model.layers[0].mlp.up_proj.weight.data[3, 5] = bad
    source.save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, hf_fp8.FP8Error)) as caught:
        quantized(tmp_path)
    assert re.search(r"layers\.0\.mlp\.up_proj: a weight .* NaN or infinite", caplog.text + str(caught.value))
    assert len(kept(quantized(tmp_path, ignore=["re:.*layers.0.mlp.up_proj", "lm_head"]))) == 13


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize("family", [None, "mixtral", "gpt_oss"])
def test_static_inputs_are_measured_first(family: str | None, tmp_path: Path) -> None:
    source = tiny_llama() if family is None else FAMILIES[family]()
    source.save_pretrained(tmp_path / "dense")
    model = quantized(tmp_path / "dense", "FP8", type(source))
    for attempt in (lambda: causal(model), lambda: model.save_pretrained(tmp_path / "saved")):
        with pytest.raises(CalibrationError, match="calibrate"):
            attempt()
    assert not (tmp_path / "saved").exists() or not list((tmp_path / "saved").glob("*.safetensors"))
    measure(model)
    model.save_pretrained(tmp_path / "saved")
    scales = {name: scale for name, scale in tensors(tmp_path / "saved").items() if name.endswith("input_scale")}
    assert scales and all(scale.isfinite().all() and (scale > 0).all() and scale.shape == (1,) for scale in scales.values())
    config = FP8Config(backend="scaled_mm", experts="fp8")
    again = type(source).from_pretrained(tmp_path / "saved", quantization_config=config)
    assert error(causal(again), causal(model)) < (1e-6 if family is None else 0.1)
