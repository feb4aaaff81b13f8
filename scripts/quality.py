"""docs/quality.md and its picture: what FP8 costs SmolLM2, layer by layer, in weights, outputs and perplexity."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).parent.parent

import compressed_tensors
import smollm2
import torch
import transformers
from loguru import logger as loguru
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp8 import FP8Config
from hf_fp8.fidelity import QualityReport, quality
from hf_fp8.fidelity.rows import median, minimum, shown

PAGE = """# Quality

Written by `scripts/quality`: {versions}. Nothing on this page was measured on a GPU.

`quality(reference, quantized, data, text=ids)` compares a quantized model with the float one, layer by layer. SQNR is
20 log10(‖x‖ / ‖x − x̂‖) in dB; 6 dB more is half the error.

- *weights*: the float weight against the quantized one, multiplied out.
- *output*: the layer alone, given what the float model gives its own, inputs quantized as the scheme says.
- *in model*: the layer's output in the quantized model against that in the float model, with what all layers before it have
  added. A few tokens with very large values may hold most of ‖x‖: what all other tokens lose does not show in such a layer.

SmolLM2-135M-Instruct in float32, {windows} windows of {window} tokens of the running text of the Python language reference;
perplexity on {tokens:,} tokens of it. The checkpoints are those of `docs/accuracy.md`. The model's weights were rounded to
4 bits before (its GGUF is Q4_1).

## FP8_DYNAMIC

![SQNR against depth]({picture})

The ten worst layers by output:

```
{worst}
```

```
{footer}
```

## Schemes

| checkpoint | scheme | weights: median / min dB | output: median / min dB | in model: median / min dB | KL, nats | perplexity |
|---|---|---|---|---|---|---|
{schemes}
"""


def measure(kind: str, reference: Any, path: Path, ids: torch.Tensor, windows: int) -> QualityReport:
    config = FP8Config(backend="scaled_mm")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    data = [{"input_ids": window, "use_cache": False} for window in smollm2.windows(ids[: windows * smollm2.WINDOW])]
    start = time.time()

    def tell(what: str, done: int, total: int | None) -> None:
        if what != "weights":
            print(f"{kind}: {what} {done} of {total}, {time.time() - start:.0f} s", file=sys.stderr, flush=True)

    return quality(reference, model, data, text=ids, window=smollm2.WINDOW, progress=tell)


def line(kind: str, report: QualityReport) -> str:
    """A line of the table of schemes."""
    values = [report.rows.values(measure) for measure in ("weight_sqnr", "output_sqnr", "accumulated_sqnr")]
    cells = [f"{shown(median(each))} / {shown(minimum(each))}" for each in values]
    kl = f"{report.kl_divergence:.4f}"
    return f"| {kind} | {'; '.join(report.schemes)} | {' | '.join(cells)} | {kl} | {report.perplexity_text()} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=smollm2.EVALUATION_TOKENS, help="how much prose to measure perplexity on")
    parser.add_argument("--windows", type=int, default=4, help="how many windows of it to compare outputs on")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="where SmolLM2's checkpoints are kept")
    parser.add_argument("--target", type=Path, default=ROOT / "docs", help="where quality.md and quality.svg are written")
    options = parser.parse_args()
    for folder in (options.folder, options.target):
        folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity(50)
    loguru.remove()
    dense = smollm2.write_dense(options.folder / "dense")
    ids = smollm2.evaluation(smollm2.prose(AutoTokenizer.from_pretrained(dense)), options.tokens)
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    reports = {}
    for kind in smollm2.KINDS:
        path = smollm2.write_fp8(dense, options.folder / kind, kind)
        reports[kind] = measure(kind, reference, path, ids, options.windows)
    report = reports["dynamic"]
    title = f"SmolLM2-135M, FP8_DYNAMIC: {'; '.join(report.schemes)}\nperplexity {report.perplexity_text()}"
    picture = report.plot(options.target / "quality.svg", title)
    print(f"{report.worst(10)}\n\n{report.footer()}\n")
    lines = [line(kind, found) for kind, found in reports.items()]
    print("\n".join(lines))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    versions = (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, compressed-tensors {compressed_tensors.__version__}; commit {commit}"
    )
    text = PAGE.format(
        versions=versions,
        windows=options.windows,
        window=smollm2.WINDOW,
        tokens=len(ids),
        picture=picture.name,
        worst=report.worst(10),
        footer=report.footer(),
        schemes="\n".join(lines),
    )
    (options.target / "quality.md").write_text(text)


if __name__ == "__main__":
    main()
