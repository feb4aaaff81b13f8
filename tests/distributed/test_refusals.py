"""What several processes cannot load together is refused by name, before anything is loaded; and what calibration refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from support.build import differing, error, group_input, tensors, tiny_llama, write
from support.checkpoints import checkpoint
from support.markdown import ROOT, blocks
from support.moe import causal, is_linear, mixtral
from support.other_floats import write_beside
from support.ranks import LAYOUTS, llama, load, make, qwen3_moe, run
from transformers import LlamaForCausalLM, MixtralForCausalLM
from transformers.distributed import DistributedConfig

import hf_fp8
from hf_fp8 import FP8Config
from hf_fp8.formats.scheme import SCHEMES, Granularity
from hf_fp8.nn.linear import QuantizedLinear

WEIGHT_ONLY = FP8Config(backend="weight_only")


def message(call: Any) -> str:
    try:
        call()
    except hf_fp8.errors.FP8Error as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def work(name: str, folder: Path) -> Any:
    if name in ("heads", "columns", "block", "rows"):
        cls = MixtralForCausalLM if name == "heads" else LlamaForCausalLM
        size = {"tp_size": dist.get_world_size()}
        options = {"quantization_config": FP8Config(), "dtype": torch.float32}
        return message(lambda: cls.from_pretrained(folder / name, distributed_config=DistributedConfig(**size), **options))
    if name == "adapters":
        found = [message(lambda: get_peft_model(load(folder / "llama.channel", "tp2"), LoraConfig(target_modules=["q_proj"])))]
        model = load(folder / "llama.channel", "fsdp2")
        for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
            config = LoraConfig(target_modules=["q_proj"], **options)
            found.append(message(lambda config=config: get_peft_model(model, config)))
        layer = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
        found += [message(lambda: layer(torch.ones(1, layer.in_features))), message(lambda: hf_fp8.dequantize_model(model))]
        found += [message(lambda: layer.weight.to(torch.bfloat16)), message(lambda: layer.weight.detach().float())]
        found.append(message(lambda: model.save_pretrained(folder / "parts", distributed_checkpoint=True)))
        cast = load(folder / "llama.channel", "tp2").to(torch.bfloat16)  # codes and scales stay
        found.append(message(lambda: hf_fp8.quantize_model(load(folder / "dense", "tp2", None))))
        whole = [module.weight.full_tensor().codes.float().sum() for module in (layer, cast.model.layers[0].self_attn.q_proj)]
        kinds = {cast.model.layers[0].self_attn.q_proj.weight.dtype, causal(cast).dtype, hf_fp8.explain(cast)[0].bytes}
        return found, whole, kinds
    layout = name.removeprefix("calibrate_")
    path = folder / "mixtral.static"
    model = load(path, layout, "scaled_mm")
    ids = torch.arange(24).reshape(2, 12)

    def calibrated() -> None:
        with hf_fp8.calibrate(model, observer="amax"):
            model(input_ids=ids + (dist.get_rank() if layout == "fsdp2" else 0), use_cache=False)

    if layout in ("pp2", "ep2"):
        return message(calibrated)
    calibrated()
    model.save_pretrained(folder / name)
    return None


def uneven(name: str, folder: Path) -> torch.Tensor:
    options: Any = {"quantization_config": WEIGHT_ONLY, "dtype": torch.float32}
    return causal(LlamaForCausalLM.from_pretrained(folder / name, distributed_config=DistributedConfig(tp_size=3), **options))


def test_layers_that_cannot_be_cut(tmp_path: Path) -> None:
    write(mixtral(), tmp_path / "heads", quantized=is_linear)
    odd = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}
    write(tiny_llama(**odd, intermediate_size=97), tmp_path / "columns")
    options: Any = {"weight": Granularity(32, 32), "inputs": group_input(32), "scale_dtype": torch.float32}
    write(tiny_llama(**odd, intermediate_size=93), tmp_path / "block", **options)
    write(tiny_llama(**odd, intermediate_size=4), tmp_path / "rows")
    wanted = causal(
        LlamaForCausalLM.from_pretrained(tmp_path / "columns", quantization_config=WEIGHT_ONLY, dtype=torch.float32)
    )
    for logits in run(3, uneven, ["columns"], tmp_path)["columns"]:
        assert error(logits, wanted) <= 1e-5
    found = run(3, work, ["heads", "columns", "block", "rows"], tmp_path)
    for name, said in {
        "heads": "q_proj has 4 heads of 16, which 3 processes cannot share: use a tp_size that divides 4",
        "columns": "down_proj.weight (48 x 97, channel x token (dynamic)): 97 columns are not a multiple of 3 processes",
        "block": "3 processes have 31 columns each, which have no divisor in common with blocks of 32: use another tp_size",
        "rows": "gate_proj.weight (4 x 48, channel x token (dynamic)): its 4 rows are too few for 3 processes",
    }.items():
        assert all(said in text and text.startswith("UnsupportedError") for text in found[name]), found[name]
        assert len(set(found[name])) == 1  # all say the same, and none waits for another


@pytest.mark.slow
def test_adapters_and_calibration(tmp_path: Path) -> None:
    make("llama", "channel", tmp_path / "llama.channel").save_pretrained(tmp_path / "dense")
    make("mixtral", "static", tmp_path / "mixtral.static")
    names = ["adapters", *(f"calibrate_{layout}" for layout in ("tp2", "fsdp2", "pp2", "ep2"))]
    found = run(2, work, names, tmp_path)
    for texts in found["adapters"]:
        (tensor_parallel, dora, pissa, called, dense, *reads, parts, in_place), (one, other), kinds = texts
        assert all("q_proj.weight holds codes in torch.float8_e4m3fn, sharded over processes" in text for text in reads)
        assert "quantize while loading (from_pretrained with quantization_config" in in_place
        assert "distributed_checkpoint=True writes parts of tensors" in parts
        assert one == other and kinds == {torch.float8_e4m3fn, torch.bfloat16, 128 * 64 + 64 * 2}
        assert "q_proj is sharded by tensor or expert parallelism, and its adapters would have to be sharded" in tensor_parallel
        assert all("FSDP has sharded its weight, which these adapters read" in text for text in (dora, pissa))
        assert "FSDP gathers it only while the module that it wrapped is called" in called
        assert "is sharded over processes, and cannot be made dense" in dense
    assert all("pipeline parallelism (pp_size)" in text for text in found["calibrate_pp2"])
    assert all("expert parallelism (ep_size)" in text for text in found["calibrate_ep2"])
    for layout, batches in (("tp2", 1), ("fsdp2", 2)):
        model = load(tmp_path / "mixtral.static", "one", "scaled_mm")
        with hf_fp8.calibrate(model, observer="amax"), torch.no_grad():
            for batch in range(batches):
                model(input_ids=torch.arange(24).reshape(2, 12) + batch, use_cache=False)
        saved = load(tmp_path / f"calibrate_{layout}", "one", "scaled_mm").state_dict()
        for name, tensor in model.state_dict().items():
            if name.endswith("input_scale"):
                assert torch.allclose(saved[name].float(), tensor.float(), rtol=0.01), (layout, name)


def page(name: str, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dataset = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 120, (8, 16), generator=generator)]
    names = {"path": str(folder / "llama.channel"), "folder": str(folder / name), "dataset": dataset}
    names |= {"adapter": str(folder / "adapter"), "merged": str(folder / "merged")}
    page = blocks((ROOT / "docs" / "distributed.md").read_text())
    (block,) = (block for block in page if block.language == "python" and block.code.startswith(f"# {name}.py"))
    exec(compile(block.code, "docs/distributed.md", "exec"), names)


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    make("llama", "channel", tmp_path / "llama.channel")
    run(2, page, ["generate", "train"], tmp_path)
    assert differing(tensors(tmp_path / "generate"), tensors(tmp_path / "llama.channel")) == []
    page("merge", tmp_path)
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "llama.channel").keys()


def other_formats(name: str, folder: Path) -> tuple[str, torch.Tensor]:
    return message(lambda: load(folder / name, "tp2")), causal(load(folder / name, "tp2", "dequantize"))


@pytest.mark.slow
def test_other_formats(tmp_path: Path) -> None:
    """They are refused by name, and dequantized in parts."""
    checkpoint("llama-mixed", tmp_path)
    options = {"targets": ["re:.*self_attn.*_proj"], "their_targets": ["re:.*mlp.*_proj"]}
    for name in ("int4 asymmetric", "nvfp4"):
        write_beside(
            llama(), tmp_path / name, name, lambda n: "self_attn" in n and n.endswith("_proj.weight"),
            lambda n: ".mlp." in n and n.endswith("_proj.weight"), **options,
        )  # fmt: skip
    for scheme in ("W4A16_ASYM", "W4A8"):
        groups = {replace(SCHEMES[scheme], weight=replace(SCHEMES[scheme].weight, granularity=Granularity(1, 8))): ["Linear"]}
        hf_fp8.quantize_model(qwen3_moe(), groups).save_pretrained(tmp_path / scheme)
    names = ["llama-mixed", "int4 asymmetric", "nvfp4", "W4A16_ASYM", "W4A8"]
    for name, results in run(2, other_formats, names, tmp_path).items():
        wanted = causal(load(tmp_path / name, "one", "dequantize"))
        why = "in formats that transformers runs" if name == "nvfp4" else "packed, several codes in each element"
        for said, found in results:
            assert f"are {why}, and " in said and "FP8Config(dequantize=True)" in said, name
            assert error(found, wanted) <= 1e-5, name


def quantized(name: str, folder: Path) -> None:
    layout, scheme = name.split(".")
    model = load(folder / "dense", layout, FP8Config(scheme, experts="fp8"), dtype=torch.bfloat16)
    if scheme == "FP8_STATIC":
        with hf_fp8.calibrate(model, observer="amax"), torch.no_grad():
            model(input_ids=torch.arange(24).reshape(2, 12), use_cache=False)
    model.save_pretrained(folder / name)


@pytest.mark.slow
def test_quantizing_while_loading(tmp_path: Path) -> None:
    """Each process reads whole weights, as scales may depend on all of them, and keeps its part of the codes of one process."""
    mixtral().save_pretrained(tmp_path / "dense")
    schemes = ("FP8_DYNAMIC", "FP8_BLOCK", "FP8_STATIC")
    names = [f"{layout}.{scheme}" for layout in ("tp2", "fsdp2") for scheme in schemes]
    run(2, quantized, names, tmp_path)
    for name in names:
        layout, scheme = name.split(".")
        assert layout in LAYOUTS
        model = load(tmp_path / "dense", "one", FP8Config(scheme, experts="fp8"), dtype=torch.bfloat16)
        if scheme == "FP8_STATIC":
            with hf_fp8.calibrate(model, observer="amax"), torch.no_grad():
                model(input_ids=torch.arange(24).reshape(2, 12), use_cache=False)
        model.save_pretrained(tmp_path / "one")
        found, wanted = tensors(tmp_path / name), tensors(tmp_path / "one")
        measured = [key for key in differing(found, wanted) if not key.endswith("input_scale")]
        assert found.keys() == wanted.keys() and measured == []


def broken(name: str, folder: Path) -> str:
    return message(lambda: load(folder / "broken", name, FP8Config("FP8_DYNAMIC", experts="fp8"), dtype=torch.bfloat16))


@pytest.mark.slow
def test_all_processes_find_what_one_of_them_reads(tmp_path: Path) -> None:
    model = mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    for found in run(2, broken, ["tp2", "ep2", "fsdp2", "pp2"], tmp_path).values():
        assert found[0] == found[1] and "experts.3.w2" in found[0] and found[0].startswith("ScaleError")


@pytest.mark.slow
def test_generating(tmp_path: Path) -> None:
    make("llama", "block128", tmp_path / "llama.block128")
    wanted = generated("one", tmp_path)
    for found in run(2, generated, ["tp2", "fsdp2", "pp2"], tmp_path).values():
        assert all(torch.equal(ids, wanted) for ids in found)


def own_plan(name: str, folder: Path) -> torch.Tensor:
    """A plan that names weights: their scales follow. And a stage of a pipeline without quantized layers."""
    if name == "plan":
        rules = {f"model.layers.*.mlp.{leaf}_proj.weight": style for leaf, style in PLAN.items()}
        modules = {f"model.layers.*.mlp.{leaf}_proj": style for leaf, style in PLAN.items()}
        layout = DistributedConfig(tp_size=2, tp_plan=rules | modules)
        model = LlamaForCausalLM.from_pretrained(
            folder / "llama.block128", quantization_config=FP8Config(backend="weight_only"), dtype=torch.float32,
            distributed_config=layout,
        )  # fmt: skip
        return causal(model)
    model = load(folder / "partly", "pp2", dtype=torch.bfloat16)
    model.save_pretrained(folder / "saved")
    return causal(model.to(torch.float32))  # the stages send float32 then


PLAN = {"gate": "colwise", "up": "colwise", "down": "rowwise"}


@pytest.mark.slow
def test_own_plans_and_partly_quantized_stages(tmp_path: Path) -> None:
    make("llama", "block128", tmp_path / "llama.block128")
    write(
        tiny_llama(num_key_value_heads=4), tmp_path / "partly",
        quantized=lambda name: "layers.0." in name and is_linear(name), ignore=["lm_head", "re:.*layers.1.*"],
    )  # fmt: skip
    for name, path in (("plan", "llama.block128"), ("stages", "partly")):
        dtype = torch.bfloat16 if name == "stages" else torch.float32
        wanted = causal(load(tmp_path / path, "one", dtype=dtype).to(torch.float32))
        assert all(error(found, wanted) <= 1e-5 for found in run(2, own_plan, [name], tmp_path)[name])
    assert differing(tensors(tmp_path / "saved"), tensors(tmp_path / "partly")) == []


def generated(name: str, folder: Path) -> torch.Tensor:
    model = load(folder / "llama.block128", name)
    ids: torch.Tensor = model.generate(torch.arange(8).unsqueeze(0), max_new_tokens=12, do_sample=False)
    return ids
