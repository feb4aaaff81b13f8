"""diffusers' models: quantized while loading and in place, saved and loaded, in pipelines, with adapters and offloading."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.markdown import ROOT, blocks
from torch import nn
from transformers import CompressedTensorsConfig

import hf_fp8
from hf_fp8 import (
    FP8Config,
    Granularity,
    PackedLinear,
    QuantizedLinear,
    Scheme,
    TensorScheme,
    dequantize_model,
    errors,
    quantize_model,
)
from hf_fp8.formats.code_types import INT4
from hf_fp8.formats.scheme import TENSOR

diffusers = pytest.importorskip("diffusers", reason="these are tests of its integration")

FLUX, SD3, UNET = diffusers.FluxTransformer2DModel, diffusers.SD3Transformer2DModel, diffusers.UNet2DConditionModel
WEIGHT_ONLY = FP8Config("FP8_DYNAMIC", backend="weight_only")
PARTS = dict.fromkeys(["vae", "text_encoder", "tokenizer", "tokenizer_2"])  # a pipeline without them


def build(kind: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind is FLUX:
        return FLUX(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        ).eval()  # fmt: skip
    if kind is SD3:
        return SD3(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8,
        ).eval()  # fmt: skip
    return UNET(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    ).eval()  # fmt: skip


def inputs(kind: Any) -> dict[str, Any]:
    random = torch.Generator().manual_seed(7)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    if kind is FLUX:
        return {
            "hidden_states": values(1, 20, 16), "encoder_hidden_states": values(1, 8, 32), "timestep": torch.ones(1),
            "pooled_projections": values(1, 32), "img_ids": torch.zeros(20, 3), "txt_ids": torch.zeros(8, 3),
        }  # fmt: skip
    if kind is SD3:
        return {
            "hidden_states": values(1, 4, 8, 8), "encoder_hidden_states": values(1, 8, 32), "timestep": torch.ones(1),
            "pooled_projections": values(1, 32),
        }  # fmt: skip
    return {"sample": values(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": values(1, 4, 32)}


def run(model: Any) -> torch.Tensor:
    given = {key: value.to(model.dtype) if torch.is_tensor(value) else value for key, value in inputs(type(model)).items()}
    with torch.no_grad():
        return model(**given).sample


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def twin(model: Any) -> Any:
    return dequantize_model(copy.deepcopy(model))


def kept(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype, key
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8)), key


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    found = {}
    for kind in (FLUX, SD3, UNET):
        found[kind] = tmp_path_factory.mktemp(kind.__name__)
        build(kind).save_pretrained(found[kind])
    return found


def load(kind: Any, path: Path, config: Any = None, **options: Any) -> Any:
    return kind.from_pretrained(path, quantization_config=config, **options)


# -- loading and saving --


@pytest.mark.parametrize("kind", [FLUX, SD3, UNET])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_TENSOR", "INT8_WEIGHT_ONLY"])
def test_quantized_while_loading(kind: Any, scheme: str, dense: dict[Any, Path], tmp_path: Path) -> None:
    config = FP8Config(scheme, backend="weight_only")
    options = config.options
    model = load(kind, dense[kind], config, torch_dtype=torch.float32)
    assert config.options == options and config.checkpoint is None
    assert_same(model, quantize_model(load(kind, dense[kind]), scheme, backend="weight_only"))
    assert error(run(model), run(twin(model))) <= 1e-5 and error(run(model), run(load(kind, dense[kind]))) > 1e-4
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors" and written["ignore"] == []
    again = load(kind, tmp_path / "saved", FP8Config(backend="weight_only"))
    assert_same(again, model)
    assert torch.equal(run(again), run(model))
    again.save_pretrained(tmp_path / "saved")  # over the files that it was loaded from
    assert_same(load(kind, tmp_path / "saved"), model)  # with nothing but the import


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY, torch_dtype=dtype)
    assert_same(model, quantize_model(load(FLUX, dense[FLUX], torch_dtype=dtype), backend="weight_only"))
    assert model.dtype == dtype and model.x_embedder.bias.dtype == dtype  # pipelines cast inputs to model.dtype
    model.save_pretrained(tmp_path / "saved")
    for other in (torch.float32, torch.bfloat16):
        again = load(FLUX, tmp_path / "saved", torch_dtype=other)
        assert again.dtype == other and again.x_embedder.bias.dtype == other
        for name, layer in kept(model).items():  # codes and scales are not cast
            assert torch.equal(kept(again)[name].weight_scale, layer.weight_scale)
            assert kept(again)[name].weight_scale.dtype == layer.weight_scale.dtype
    assert again.to(torch.float16).dtype == torch.float16 and again.half().x_embedder.bias.dtype == torch.float16


def test_sharded_and_placed(dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}):
        assert_same(load(FLUX, tmp_path / "saved", **options), model)
        assert_same(load(FLUX, dense[FLUX], WEIGHT_ONLY, **options), model)
    for path, config in ((tmp_path / "saved", None), (dense[FLUX], WEIGHT_ONLY)):
        with pytest.raises(ValueError, match="low_cpu_mem_usage"):  # diffusers', for every quantizer
            load(FLUX, path, config, low_cpu_mem_usage=False)
        with pytest.raises(errors.UnsupportedError, match="offloads to disk"):
            load(FLUX, path, config, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_variants_and_pickles(dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    model.save_pretrained(tmp_path / "variant", variant="fp8")
    assert_same(load(FLUX, tmp_path / "variant", variant="fp8"), model)
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    assert_same(load(FLUX, tmp_path / "pickle"), model)


def test_without_hf_fp8_it_is_an_error(dense: dict[Any, Path], tmp_path: Path) -> None:
    load(FLUX, dense[FLUX], WEIGHT_ONLY).save_pretrained(tmp_path / "saved")
    before = load(FLUX, tmp_path / "saved")
    hf_fp8.unregister()
    try:
        with pytest.raises(ValueError, match="Unknown quantization type, got compressed-tensors"):
            load(FLUX, tmp_path / "saved")
        assert "hf_fp8" not in FLUX.save_pretrained.__code__.co_filename
        load(FLUX, dense[FLUX])
    finally:
        hf_fp8.register()
    assert_same(load(FLUX, tmp_path / "saved"), before)


@pytest.mark.slow
def test_without_hf_fp8_in_a_new_process(dense: dict[Any, Path], tmp_path: Path) -> None:
    load(FLUX, dense[FLUX], WEIGHT_ONLY).save_pretrained(tmp_path / "saved")
    code = f"import diffusers; diffusers.FluxTransformer2DModel.from_pretrained({str(tmp_path / 'saved')!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode and "Unknown quantization type, got compressed-tensors" in found.stderr


@pytest.mark.slow
def test_the_import_imports_nothing() -> None:
    code = (
        "import sys, hf_fp8; assert 'diffusers' not in sys.modules; import diffusers;"
        "assert 'diffusers.models.modeling_utils' not in sys.modules;"
        "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found; assert 'hf_fp8' in found;"
        "hf_fp8.unregister(); assert not {'hf_fp8', 'compressed-tensors'} & found.keys(); print('as wanted')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "as wanted\n"


@pytest.mark.parametrize("zeros", [False, True])
def test_packed_codes(zeros: bool, dense: dict[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheme = Scheme(TensorScheme(Granularity(1, 32), dtype=INT4, has_zero_points=zeros))
    caplog.set_level(logging.WARNING)
    model = load(FLUX, dense[FLUX], FP8Config(scheme))
    assert "K = 16 is not a multiple of the group size 32" in caplog.text and type(model.x_embedder) is nn.Linear
    assert all(isinstance(layer, PackedLinear) for layer in kept(model).values()) and len(kept(model)) > 20
    assert error(run(model), run(twin(model))) <= 1e-5
    model.save_pretrained(tmp_path / "saved")
    again = load(FLUX, tmp_path / "saved")
    assert_same(again, model)
    assert torch.equal(run(again), run(model))


# -- which layers --


def test_targets_ignore_and_groups(dense: dict[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = FP8Config("FP8_DYNAMIC", ignore=["proj_out", "re:.*norm", "nothing"], backend="weight_only")
    caplog.set_level(logging.WARNING)
    model = load(FLUX, dense[FLUX], config)
    assert "'nothing' in `ignore` matches no Linear" in caplog.text
    layers = kept(model)
    assert "proj_out" not in layers and "x_embedder" in layers and not any("norm" in name for name in layers)
    model.save_pretrained(tmp_path / "ignored")
    assert_same(load(FLUX, tmp_path / "ignored"), model)
    only = load(FLUX, dense[FLUX], FP8Config("FP8_DYNAMIC", targets=["re:.*to_[qkv]$"]))
    assert {name.rpartition(".")[2] for name in kept(only)} == {"to_q", "to_k", "to_v"}
    several = {"FP8_DYNAMIC": ["re:.*to_[qkv]$"], "FP8_TENSOR": ["proj_out"], Scheme(TensorScheme(TENSOR)): ["x_embedder"]}
    model = load(FLUX, dense[FLUX], FP8Config(several, backend="weight_only"))
    model.save_pretrained(tmp_path / "several")
    again = load(FLUX, tmp_path / "several", FP8Config(backend="weight_only"))
    assert_same(again, model)
    assert {name: layer.scheme for name, layer in kept(again).items()} == {n: m.scheme for n, m in kept(model).items()}
    assert len({layer.scheme for layer in kept(again).values()}) == 3
    with pytest.raises(errors.ConfigError, match=r"no layer of FluxTransformer2DModel is quantized by targets \['nowhere'\]"):
        load(FLUX, dense[FLUX], FP8Config("FP8_DYNAMIC", targets=["nowhere"]))


def test_what_the_model_keeps_in_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    kind = diffusers.WanTransformer3DModel
    kind(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).save_pretrained(tmp_path / "dense")  # fmt: skip
    caplog.set_level(logging.WARNING)
    model = load(kind, tmp_path / "dense", WEIGHT_ONLY, torch_dtype=torch.bfloat16)
    assert "time_embedder in float32" in caplog.text
    embedder = model.condition_embedder.time_embedder.linear_1
    assert type(embedder) is nn.Linear and embedder.weight.dtype == torch.float32
    assert model.scale_shift_table.dtype == torch.float32 and model.blocks[0].norm2.weight.dtype == torch.float32
    assert isinstance(model.blocks[0].attn1.to_q, QuantizedLinear) and model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(kind, tmp_path / "saved", torch_dtype=torch.bfloat16), model)
    assert_same(model, quantize_model(load(kind, tmp_path / "dense", torch_dtype=torch.bfloat16), backend="weight_only"))
    with torch.no_grad():
        x = {
            "hidden_states": torch.randn(1, 4, 1, 4, 4),
            "timestep": torch.tensor([900]),
            "encoder_hidden_states": torch.randn(1, 3, 16),
        }
        x = {key: value.bfloat16() if value.is_floating_point() else value for key, value in x.items()}
        assert error(model(**x).sample, twin(model)(**x).sample) < 0.02


def test_layers_to_whose_dtype_inputs_are_cast() -> None:
    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedder, self.out = Embedder(), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.embedder(x.to(next(iter(self.embedder.parameters())).dtype)))

    model = quantize_model(Model(), backend="weight_only")
    assert type(model.embedder.first) is nn.Linear and set(kept(model)) == {"embedder.second", "out"}
    assert model(torch.randn(2, 8)).dtype == torch.float32


# -- other requests --


def test_options_for_a_quantized_folder(dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    model.save_pretrained(tmp_path / "saved")
    assert {layer.backend for layer in kept(load(FLUX, tmp_path / "saved")).values()} == {"auto"}
    assert {m.backend for m in kept(load(FLUX, tmp_path / "saved", FP8Config(backend="scaled_mm"))).values()} == {"scaled_mm"}
    plain = load(FLUX, tmp_path / "saved", FP8Config(dequantize=True), torch_dtype=torch.float32)
    assert not kept(plain) and torch.equal(run(plain), run(twin(model)))
    assert "quantization_config" not in plain.config
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert_same(load(FLUX, tmp_path / "plain"), plain)
    int8 = load(FLUX, tmp_path / "saved", FP8Config(backend="int8"))
    assert {layer.weight.dtype for layer in kept(int8).values()} == {torch.int8}
    int8.save_pretrained(tmp_path / "int8")
    assert_same(load(FLUX, tmp_path / "int8"), int8)
    with pytest.raises(errors.ConfigError, match="quantized already"):
        load(FLUX, tmp_path / "saved", FP8Config("FP8_TENSOR"))
    with pytest.raises(errors.ConfigError, match="Pass FP8Config"):
        load(FLUX, dense[FLUX], FP8Config())
    for config in (
        {"quant_method": "hf_fp8", "scheme": "FP8_DYNAMIC"},
        CompressedTensorsConfig(config_groups={"FP8_DYNAMIC": ["Linear"]}),
    ):
        assert_same(load(FLUX, dense[FLUX], config), model)


def test_back_to_dense(dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    wanted = run(model)
    for back in (dequantize_model(copy.deepcopy(model)), copy.deepcopy(model).dequantize()):
        assert not kept(back) and error(run(back), wanted) < 1e-5
        back.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        assert_same(load(FLUX, tmp_path / "dense"), back)


def test_copied_and_pickled(dense: dict[Any, Path]) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(other, model)
        assert torch.equal(run(other), run(model))


def test_quantized_in_place_and_saved(dense: dict[Any, Path], tmp_path: Path) -> None:
    model = quantize_model(load(FLUX, dense[FLUX]), "FP8_TENSOR", targets=["re:.*to_[qkv]$"], backend="weight_only")
    quantize_model(model, "INT8_WEIGHT_ONLY", targets=["proj_out"], backend="weight_only")
    model.save_pretrained(tmp_path / "saved")
    again = load(FLUX, tmp_path / "saved", FP8Config(backend="weight_only"))
    assert_same(again, model)
    assert torch.equal(run(again), run(model))
    dequantize_model(model).save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    hf_fp8.save_quantized(again, tmp_path / "ours")
    assert_same(hf_fp8.load_quantized(build(FLUX, 1), tmp_path / "ours"), again)
    static = load(FLUX, dense[FLUX], FP8Config("FP8", targets=["re:.*to_[qkv]$"]))
    with pytest.raises(errors.CalibrationError, match="no input scale yet"):
        static.save_pretrained(tmp_path / "static")
    assert not (tmp_path / "static").exists()
    with hf_fp8.calibrate(static):
        run(static)
    static.save_pretrained(tmp_path / "static")
    assert_same(load(FLUX, tmp_path / "static"), static)


def test_models_that_save_their_parts(tmp_path: Path) -> None:
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    torch.manual_seed(0)
    nets = [
        diffusers.ControlNetModel(
            in_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
            conditioning_embedding_out_channels=(8, 8),
        )
        for _ in range(2)
    ]  # fmt: skip
    both = quantize_model(MultiControlNetModel(nets), backend="weight_only")
    both.save_pretrained(str(tmp_path / "nets"))
    again = MultiControlNetModel.from_pretrained(str(tmp_path / "nets"))
    assert len(again.nets) == 2 and all(kept(net) for net in again.nets)
    assert_same(again, both)


def test_what_is_not_saved(dense: dict[Any, Path], tmp_path: Path) -> None:
    unet = quantize_model(load(UNET, dense[UNET]), conv1x1=True)
    with pytest.raises(errors.UnsupportedError, match="is a convolution in FP8"):
        unet.save_pretrained(tmp_path / "saved")
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    model.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(errors.UnsupportedError, match=r"has an adapter.*unload"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("case", ["scale", "weight", "orphan", "dense", "codes", "nan", "shape"])
def test_files_that_do_not_fit(case: str, dense: dict[Any, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(FLUX, dense[FLUX], FP8Config("FP8_DYNAMIC", ignore=["proj_out"])).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = {"orphan": "proj_out.weight_scale", "codes": "proj_out.weight"}.get(case, "x_embedder.weight")
    if case == "weight":
        del state["x_embedder.weight"]
        name = "x_embedder.weight_scale"
    elif case in ("scale", "nan"):
        name = "x_embedder.weight_scale"
        state[name] = state[name] * float("nan")
        if case == "scale":
            del state[name]
    else:
        state[name] = {
            "orphan": torch.ones(16, 1), "dense": torch.ones(32, 16), "codes": torch.zeros(16, 32).to(torch.float8_e4m3fn),
            "shape": torch.zeros(32, 8).to(torch.float8_e4m3fn),
        }[case]  # fmt: skip
    save_file(state, file)
    with pytest.raises(errors.CheckpointError, match=name.replace(".", r"\.")):
        load(FLUX, tmp_path / "saved")


def test_formats_of_others_are_refused(dense: dict[Any, Path], tmp_path: Path) -> None:
    load(FLUX, dense[FLUX], WEIGHT_ONLY).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"] |= {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}
    group["format"] = "nvfp4-pack-quantized"
    path.write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedError, match="'group_0' has weights in the format nvfp4-pack-quantized"):
        load(FLUX, tmp_path / "saved")


def test_single_file(dense: dict[Any, Path]) -> None:
    options = {"config": str(dense[FLUX]), "torch_dtype": torch.float32}
    state = build(FLUX).state_dict()
    model = FLUX.from_single_file(dict(state), quantization_config=WEIGHT_ONLY, **options)
    assert_same(model, load(FLUX, dense[FLUX], WEIGHT_ONLY))
    with pytest.raises(errors.ConfigError, match="Pass FP8Config"):
        FLUX.from_single_file(dict(state), quantization_config=FP8Config(), **options)


# -- pipelines --


def pipeline(transformer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2, vocab_size=99))
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer, text_encoder_2=encoder, **PARTS
    )


def images(pipe: Any, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(3)
    return pipe(
        prompt_embeds=torch.randn(1, 4, 32, generator=random), pooled_prompt_embeds=torch.randn(1, 32, generator=random),
        num_inference_steps=2, height=32, width=32, output_type="latent", generator=random, **options,
    ).images  # fmt: skip


def test_pipelines(tmp_path: Path) -> None:
    pipeline(build(FLUX)).save_pretrained(tmp_path / "dense")
    asked = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": WEIGHT_ONLY, "text_encoder_2": WEIGHT_ONLY})
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "dense", quantization_config=asked, **PARTS)
    assert isinstance(pipe.transformer.x_embedder, QuantizedLinear) and kept(pipe.text_encoder_2)
    wanted = images(pipe)
    twins = pipeline(twin(pipe.transformer))
    assert error(wanted, images(twins)) < 1e-5
    pipe.save_pretrained(tmp_path / "saved")
    assert pipe.transformer.config["quantization_config"]["quant_method"] == "compressed-tensors"
    for kind in (diffusers.DiffusionPipeline, diffusers.FluxPipeline):
        again = kind.from_pretrained(tmp_path / "saved", **PARTS)
        assert_same(again.transformer, pipe.transformer)
        assert torch.equal(images(again), wanted)
    plain = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": FP8Config(dequantize=True)})
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", quantization_config=plain, **PARTS)
    assert not kept(again.transformer) and error(images(again), wanted) < 1e-5
    by_backend = diffusers.PipelineQuantizationConfig(
        quant_backend="hf_fp8", quant_kwargs={"scheme": "FP8_DYNAMIC"}, components_to_quantize=["transformer"]
    )
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "dense", quantization_config=by_backend, **PARTS)
    assert_same(again.transformer, pipe.transformer)
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "dense", **PARTS)
    quantize_model(pipe.transformer, backend="weight_only")
    pipe.save_pretrained(tmp_path / "in_place")
    assert torch.equal(images(diffusers.FluxPipeline.from_pretrained(tmp_path / "in_place", **PARTS)), wanted)


# -- adapters --


def adapter() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


@pytest.mark.parametrize("kind", [FLUX, SD3, UNET])
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8_WEIGHT_ONLY"])
def test_adapters(kind: Any, scheme: str, dense: dict[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(kind, dense[kind], FP8Config(scheme, backend="weight_only"))
    base, plain = run(model), twin(model)
    for adapted in (model, plain):
        torch.manual_seed(1)
        adapted.add_adapter(adapter(), "one")
    wanted = run(plain)
    assert error(run(model), wanted) <= 1e-5 < error(base, wanted)
    model.save_lora_adapter(tmp_path, adapter_name="one")
    loaded = load(kind, dense[kind], FP8Config(scheme, backend="weight_only"))
    loaded.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors", adapter_name="one")
    assert torch.equal(run(loaded), run(model))
    caplog.set_level(logging.WARNING)
    loaded.fuse_lora(lora_scale=1.0)
    assert len([r for r in caplog.records if "adapters have changed" in r.getMessage()]) == 1
    assert error(run(loaded), wanted) < 0.1  # rounded to codes again
    loaded.unfuse_lora()
    assert error(run(loaded), wanted) <= 1e-5
    with hf_fp8.merging("dense"):
        loaded.fuse_lora()
    assert error(run(loaded), wanted) <= 1e-5
    loaded.unload_lora()
    assert error(run(loaded), wanted) <= 1e-5  # diffusers keeps what was fused
    loaded.save_pretrained(tmp_path / "fused")
    assert_same(load(kind, tmp_path / "fused"), loaded)
    model.disable_lora()
    assert torch.equal(run(model), base)
    model.unload_lora()
    assert torch.equal(run(model), base)


def test_adapters_of_a_pipeline(dense: dict[Any, Path], tmp_path: Path) -> None:
    pipe = pipeline(load(FLUX, dense[FLUX], WEIGHT_ONLY))
    before = images(pipe)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(adapter(), "one")
    wanted = images(pipe)
    state = {
        f"transformer.{name.replace('.one', '')}": tensor.clone()
        for name, tensor in pipe.transformer.state_dict().items()
        if ".lora_" in name
    }
    other = pipeline(load(FLUX, dense[FLUX], WEIGHT_ONLY))
    other.load_lora_weights({k: 2**0.5 * v for k, v in state.items()}, adapter_name="one")  # the file has no alpha: 8 / 4
    assert error(images(other), wanted) < 1e-5 < error(before, wanted)
    with hf_fp8.merging("dense"):
        other.fuse_lora()
    assert error(images(other), wanted) < 1e-5
    other.unfuse_lora()
    other.set_adapters(["one"], [0.0])
    assert error(images(other), before) < 1e-5
    other.unload_lora_weights()
    assert torch.equal(images(other), before)


def test_adapters_with_more_inputs(dense: dict[Any, Path]) -> None:
    """Flux's control adapters: diffusers adds columns to the weight of the layer."""
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    plain, weight = twin(model), model.x_embedder.dequantized_weight()
    torch.manual_seed(3)
    state = {
        "transformer.x_embedder.lora_A.weight": torch.randn(4, 32),
        "transformer.x_embedder.lora_B.weight": torch.randn(32, 4),
        "transformer.x_embedder.lora_B.bias": torch.randn(32),
        # Of a layer with the name of another one, which has fewer inputs.
        "transformer.single_transformer_blocks.0.proj_out.lora_A.weight": torch.randn(4, 160),
        "transformer.single_transformer_blocks.0.proj_out.lora_B.weight": torch.randn(32, 4),
        "transformer.single_transformer_blocks.0.proj_out.lora_B.bias": torch.randn(32),
    }
    for transformer in (model, plain):
        pipeline(transformer).load_lora_weights(dict(state), adapter_name="control")
    held, x = model.x_embedder.base_layer, torch.randn(2, 32)
    assert type(held) is nn.Linear and torch.equal(held.weight[:, :16], weight) and not held.weight[:, 16:].any()
    assert torch.equal(model.x_embedder(x), plain.x_embedder(x))
    assert isinstance(model.proj_out, QuantizedLinear)
    assert isinstance(model.single_transformer_blocks[0].proj_out.base_layer, QuantizedLinear)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8_WEIGHT_ONLY"])
def test_adapters_that_replace_forward(scheme: str, dense: dict[Any, Path]) -> None:
    """As kohya's scripts and ComfyUI's nodes do: old(x) + up(down(x))."""
    model = load(FLUX, dense[FLUX], FP8Config(scheme, backend="weight_only"))
    plain = twin(model)
    for each in (model, plain):
        for number, name in enumerate(n for n in kept(model) if n.endswith(("to_q", "proj_mlp"))):
            layer = each.get_submodule(name)
            torch.manual_seed(number)
            down, up = nn.Linear(layer.in_features, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)

            def forward(x: torch.Tensor, old: Any = layer.forward, down: nn.Linear = down, up: nn.Linear = up) -> torch.Tensor:
                return old(x) + up(down(x))

            layer.forward = forward
    assert error(run(model), run(plain)) <= 1e-5 < error(run(model), run(load(FLUX, dense[FLUX])))


def copies_of_weights(model: nn.Module, given: dict[str, Any]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """(shapes of tensors that a graph keeps, which have the shape of a quantized weight and are no parameters; the loss)."""
    held = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    sizes = {(layer.out_features, layer.in_features) for layer in kept(model).values()}
    found: list[tuple[int, ...]] = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        shape = tuple(tensor.shape)
        if (shape in sizes or shape[::-1] in sizes) and tensor.untyped_storage().data_ptr() not in held:
            found.append(shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        loss = model(**given).sample.square().mean()
    return found, loss


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "INT8"])
@pytest.mark.parametrize("kind", [FLUX, UNET])
def test_training_of_adapters(kind: Any, scheme: str, dense: dict[Any, Path]) -> None:
    """The graph refers to codes and scales; no dequantized weight is kept until the backward."""
    model = quantize_model(load(kind, dense[kind]), scheme).train()
    model.requires_grad_(False)
    model.add_adapter(adapter(), "one")
    copies, loss = copies_of_weights(model, inputs(kind))
    assert not copies
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    # A forward that multiplies by a dequantized weight would have been found.
    layer = next(layer for name, layer in kept(model).items() if name.endswith(("ff.net.2", "proj_mlp")))
    layer.forward = lambda x: nn.functional.linear(x, layer.dequantized_weight(), layer.bias)
    shape = layer.out_features, layer.in_features
    assert {shape, shape[::-1]} & set(copies_of_weights(model, inputs(kind))[0])


# -- casting and offloading --


def test_layerwise_casting(dense: dict[Any, Path]) -> None:
    """Quantized layers stay as they are, biases too; all other modules are cast as in the dequantized model."""
    model = load(UNET, dense[UNET], WEIGHT_ONLY)
    plain = twin(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    plain.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32, skip_modules_classes=(nn.Linear,))
    assert {layer.bias.dtype for layer in kept(model).values() if layer.bias is not None} == {torch.float32}
    assert model.down_blocks[0].resnets[0].conv1.weight.dtype == torch.float8_e4m3fn and model.dtype == torch.float32
    for _ in range(2):
        assert error(run(model), run(plain)) <= 1e-5
    half = load(UNET, dense[UNET], WEIGHT_ONLY, torch_dtype=torch.bfloat16)
    half.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and run(half).dtype == torch.bfloat16


def test_layers_that_are_cast_are_not_saved_as_codes(dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], FP8Config("FP8_DYNAMIC", ignore=["re:single.*"], backend="weight_only"))
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(errors.UnsupportedError, match=r"single_transformer_blocks.*layerwise casting"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("kind", [FLUX, UNET])
@pytest.mark.parametrize("how", ["leaf", "block", "disk"])
def test_group_offload(kind: Any, how: str, dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(kind, dense[kind], WEIGHT_ONLY)
    wanted, cpu = run(model), torch.device("cpu")
    options: dict[str, Any] = {"offload_type": "leaf_level"}
    if how == "block":
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    elif how == "disk":
        options["offload_to_disk_path"] = str(tmp_path)
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    for _ in range(2):
        assert torch.equal(run(model), wanted)


def test_offload_to_the_cpu(dense: dict[Any, Path]) -> None:
    """The hooks that enable_model_cpu_offload and enable_sequential_cpu_offload set; those need an accelerator."""
    from accelerate import cpu_offload, cpu_offload_with_hook

    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    wanted = run(model)
    model, _ = cpu_offload_with_hook(model, torch.device("cpu"))
    assert torch.equal(run(model), wanted)
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    cpu_offload(model, torch.device("cpu"))
    assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("kind", [FLUX, UNET])
def test_fused_projections(kind: Any, dense: dict[Any, Path]) -> None:
    model = load(kind, dense[kind], WEIGHT_ONLY)
    wanted = run(model)
    model.fuse_qkv_projections()
    assert error(run(model), wanted) <= 1e-5
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), wanted)


def test_gradient_checkpointing(dense: dict[Any, Path]) -> None:
    model, given = load(UNET, dense[UNET], WEIGHT_ONLY), inputs(UNET)
    grads = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        sample = given["sample"].clone().requires_grad_()
        model.train()(**{**given, "sample": sample}).sample.sum().backward()
        grads.append(sample.grad)
    assert error(grads[1], grads[0]) < 1e-6


@pytest.mark.slow
def test_compiled_blocks(dense: dict[Any, Path]) -> None:
    model = load(FLUX, dense[FLUX], WEIGHT_ONLY)
    wanted = run(model)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert error(run(model), wanted) <= 1e-6


# -- single files of ComfyUI's world --


@pytest.mark.parametrize("form", ["fp8_scaled", "comfy_quant"])
def test_fp8_files(form: str, dense: dict[Any, Path], tmp_path: Path) -> None:
    model = load(FLUX, dense[FLUX], FP8Config("FP8_TENSOR", backend="weight_only"))
    hf_fp8.save_quantized(model, tmp_path / "flux.safetensors", format=form)
    again = hf_fp8.load_fp8_state_dict(build(FLUX, 1), tmp_path / "flux.safetensors", backend="weight_only")
    assert_same(again, model)
    assert torch.equal(run(again), run(model))
    again.save_pretrained(tmp_path / "saved")  # its layers have no input scheme, and the config says so
    assert_same(load(FLUX, tmp_path / "saved"), model)


# -- the page --


def test_the_page(
    dense: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/diffusion.md: its Python runs on small models, and prints what it says."""
    monkeypatch.chdir(tmp_path)
    pipeline(build(FLUX)).save_pretrained("pipeline")
    hf_fp8.save_quantized(quantize_model(build(FLUX), "FP8_TENSOR"), "flux1-dev_fp8_scaled.safetensors", format="fp8_scaled")
    whole = diffusers.DiffusionPipeline.from_pretrained  # a small pipeline has no parts but these
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: whole(*args, **kwargs, **PARTS))
    names: dict[str, Any] = {
        "dense": dense[FLUX], "folder": "folder", "pipeline": "pipeline", "other": "other",
        "build_the_float_model": lambda: build(FLUX),
    }  # fmt: skip
    page = (ROOT / "docs" / "diffusion.md").read_text()
    for block in blocks(page):
        exec(compile(block.code, "docs/diffusion.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed and all(f"# {line}" in page for line in printed)
    assert kept(names["pipe"].text_encoder_2) and (tmp_path / "other" / "transformer").exists()
    assert len(kept(names["model"])) == len(kept(names["quantized"])) > 20
