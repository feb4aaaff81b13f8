"""Imports point down a written list; importing the package starts no GPU and no Triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import hf_fp8

PACKAGE = Path(hf_fp8.__file__).parent

# Each line imports only from lines above it.
LAYERS = [
    {"errors", "version"},
    {"weight_source", "scheme"},
    {"cast_values"},
    {"quantized_weight"},
    {"weight_functions"},
    {"held"},
    {"plain_pickle", "scratch"},
    {"casts"},
    {"numerics"},
    {"kernels.kernel", "kernels.thresholds", "kernels.tiling", "kernels.triton_scales", "kernels.triton_support"},
    {"kernels.triton_quantize", "kernels.triton_weight_only", "kernels.triton_epilogue"},
    {"kernels.quantize"},
    {"kernels.torch_mm", "kernels.int8_quantize", "kernels.int8_mm", "kernels.triton_mm", "kernels.grouped_mm"},
    {"kernels.triton_grouped", "kernels.probe"},
    {"kernels"},
    {"shared_input"},
    {"changes", "gradients", "low_rank"},
    {"originals", "quantized_module", "stacks"},
    {"functional", "other_savers"},
    {"grouped", "linear"},
    {"pointwise"},
    {"experts"},
    {"parallel"},
    {"groups", "load_options", "one_at_a_time", "parts", "observers", "reads", "files", "serving"},
    {"weight_readers", "spec"},
    {"options"},
    {"headers", "bin_files", "weight_files"},
    {"candidates", "convert", "explain", "config", "checkpoint"},
    {"dtype_plan", "expert_names", "keymap", "calibration"},
    {"asked", "fidelity.run", "fidelity.rows", "shards", "merging", "placement"},
    {"adapters.records", "adapters.patches"},
    {"adapters.weights", "adapters.forwards", "adapters.preparing"},
    {"adapters.making"},
    {"adapters"},
    {"fidelity.outputs", "fidelity.plot"},
    {"fidelity.report"},
    {"fidelity.compare"},
    {"fidelity", "portable"},
    {"stored"},
    {"scan"},
    {"coverage", "layout", "undeclared"},
    {"expert_plan", "ops"},
    {"expert_ops"},
    {"conversions"},
    {"extra_tensors"},
    {"matching", "saving", "load_report"},
    {"plan"},
    {"quantizer", "host_form"},
    {"adopt", "host_methods"},
    {"registration"},
    {"choice", "source"},
    {"methods"},
    {"in_place", "rewrite", "calibration_data"},
    {"inspection", "recipes"},
    {"cli"},
    {""},
]
# The rest serves any PyTorch model.
MAY_IMPORT_TRANSFORMERS = {
    "config", "experts", "low_rank", "expert_names", "expert_plan", "keymap", "conversions", "ops",
    "dtype_plan", "matching", "quantizer", "asked", "registration", "plan", "adopt", "choice", "source", "calibration_data",
    "cli", "host_form", "rewrite", "extra_tensors", "load_report", "saving", "methods", "coverage", "undeclared",
    "host_methods",
}  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> tuple[set[str], set[str]]:
    """(modules of the package, packages outside) that a file imports, anywhere in it."""
    inside, outside = set(), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".") if package else []
            base = base[: len(base) - node.level + 1]
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{target}.{alias.name}" if target else alias.name
                inside.add(below if below in modules() else target)
    return inside, outside


def test_every_module_has_a_layer() -> None:
    assert set().union(*LAYERS) == set(modules())


def test_imports_point_down() -> None:
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    for name, path in modules().items():
        for target in imports(name, path)[0]:
            assert level[target] < level[name], f"{name or 'hf_fp8'} imports {target}"


def test_who_knows_transformers() -> None:
    found = {name for name, path in modules().items() if "transformers" in imports(name, path)[1]}
    assert found == MAY_IMPORT_TRANSFORMERS


def test_import_is_lean() -> None:
    code = (
        "import sys, torch; from transformers import CompressedTensorsConfig, PreTrainedModel;"
        "before = torch.cuda.is_initialized(), 'triton' in sys.modules;"
        "import hf_fp8;"
        "assert (torch.cuda.is_initialized(), 'triton' in sys.modules) == before;"
        "ours = [name for name in sys.modules if name.startswith('hf_fp8.kernels.triton_')];"
        "assert ours == ['hf_fp8.kernels.triton_support'], ours;"
        "print('lean')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "lean\n"
