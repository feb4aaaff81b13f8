"""The command line: `hf-fp8 quantize | dequantize | convert | inspect | verify`."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import ConfigError, FP8Error
from .formats.scheme import SCHEMES
from .version import __version__

app = typer.Typer(
    help="Quantize, dequantize, convert, inspect and verify FP8 checkpoints.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
# Characters that control a terminal or cannot be encoded: names that come from files may contain them.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class _Plain(Console):
    """Prints strings unchanged, except that control characters are escaped."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(_plain(each) if isinstance(each, str) else each for each in objects), **options)


def _plain(text: str) -> str:
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


out = _Plain(highlight=False, soft_wrap=True, markup=False)
err = _Plain(stderr=True, highlight=False, soft_wrap=True, markup=False)

Src = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, or the name of a repository on the Hub.")]
SrcOrFile = Annotated[
    str, typer.Argument(metavar="SRC", help="As for the other commands; or a single .safetensors file, as of ComfyUI.")
]
Dst = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write. It appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at DST when the new one is complete.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that comes with the checkpoint.")]


Revision = Annotated[
    str | None, typer.Option("--revision", help="Of a repository on the Hub: a branch, a tag or the hash of a commit.")
]
ObserverName = Literal["amax", "percentile", "mse"]
DtypeName = Literal["bfloat16", "float16", "float32"]
ConvertedTo = Literal["compressed-tensors", "fp8"]


@app.command()
def quantize(
    src: Src,
    dst: Dst,
    scheme: Annotated[
        list[str],
        typer.Option(help=f"One of {', '.join(SCHEMES)}; or NAME=TARGET, several times."),
    ] = ["FP8_DYNAMIC"],  # noqa: B006 (typer's way)
    ignore: Annotated[
        list[str] | None, typer.Option(help="A module that stays dense: its name, a re: pattern or a class. Several times.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="What to quantize: names, re: patterns, classes (by default Linear).")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text, or .jsonl with `text` or `messages`, for static input scales.")
    ] = None,
    # The default is `observers.DEFAULT`, which says why; reading it here would import torch for `--help`.
    observer: Annotated[ObserverName, typer.Option(help="How static input scales are chosen.")] = "mse",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens of FILE are used.")] = 16384,
    dense_experts: Annotated[bool, typer.Option("--dense-experts", help="Leave the experts of an MoE model dense.")] = False,
    device: Annotated[str, typer.Option(help="Where to quantize, and to calibrate.")] = "cpu",
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Quantize a dense checkpoint to FP8, int8 or int4, tensor by tensor."""
    from .errors import by_reason
    from .integrations.config import FP8Config
    from .quantization.calibration_text import measure
    from .quantization.files import check_destination, quantize_checkpoint, total_bytes
    from .quantization.source import open_source

    start = time.perf_counter()
    if targets and any("=" in entry for entry in scheme):
        raise typer.BadParameter("--target goes with one --scheme; NAME=TARGET has its own target")
    _check_device(device)
    source = open_source(src, revision=revision, trust_remote_code=trust_remote_code)
    check_destination(source, dst, overwrite)
    config = FP8Config(
        _schemes(scheme), targets=targets or ["Linear"], ignore=ignore, experts="dequantize" if dense_experts else "auto"
    )
    scales = None
    if calibrate is not None:
        if not any(group.scheme and group.scheme.has_static_input for group in config.groups):
            raise typer.BadParameter(f"--calibrate measures static input scales, which {', '.join(scheme)} does not have")
        how: dict[str, Any] = {"observer": observer, "tokens": tokens, "device_map": device}
        with _bar("calibrating", 0, bytes_=False) as tick:
            scales = measure(source, config, calibrate, **how, tick=lambda done, of: tick(1, of))
    with _bar("quantizing", total_bytes(source.checkpoint)) as tick:
        written = quantize_checkpoint(source, dst, config, input_scales=scales, device=device, overwrite=overwrite, tick=tick)
    if written.reasons:
        err.print(f"left dense: {by_reason(written.reasons)}")
    if written.unmatched:
        err.print(f"--ignore {', '.join(written.unmatched)}: matches nothing")
    out.print(
        f"{dst}: {written.weights:,} matrices quantized, {_size(written.before)} -> {_size(written.after)} "
        f"({written.after / written.before:.2f}x), {time.perf_counter() - start:.1f} s"
    )


@app.command()
def dequantize(
    src: Src,
    dst: Dst,
    dtype: Annotated[DtypeName | None, typer.Option(help="The dtype of the weights (by default that of config.json).")] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Dequantize an FP8 checkpoint to a dense one, tensor by tensor."""
    import torch

    from .quantization.files import check_destination, dequantize_checkpoint, total_bytes
    from .quantization.source import open_source

    start = time.perf_counter()
    source = open_source(src, revision=revision, trust_remote_code=trust_remote_code)
    check_destination(source, dst, overwrite)
    of = None if dtype is None else getattr(torch, dtype)
    with _bar("dequantizing", total_bytes(source.checkpoint)) as tick:
        written = dequantize_checkpoint(source, dst, dtype=of, overwrite=overwrite, tick=tick)
    out.print(
        f"{dst}: {written.weights:,} matrices dequantized, {_size(written.before)} -> {_size(written.after)}, "
        f"{time.perf_counter() - start:.1f} s"
    )


@app.command()
def convert(
    src: Src,
    dst: Dst,
    to: Annotated[ConvertedTo, typer.Option(help="The format to write: that of llm-compressor, or of DeepSeek and Qwen.")],
    scheme: Annotated[
        str | None,
        typer.Option(help=f"Quantize the weights anew, which loses precision: {', '.join(SCHEMES)}."),
    ] = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Convert a quantized checkpoint to another format, tensor by tensor; codes are copied unless --scheme is given."""
    from .formats.scheme import scheme_named
    from .quantization.convert import convert_checkpoint
    from .quantization.files import check_destination, total_bytes
    from .quantization.source import open_source

    start = time.perf_counter()
    source = open_source(src, revision=revision, trust_remote_code=trust_remote_code)
    check_destination(source, dst, overwrite)
    new = None if scheme is None else scheme_named(scheme)
    with _bar("converting", total_bytes(source.checkpoint)) as tick:
        written, loss = convert_checkpoint(source, dst, to, scheme=new, overwrite=overwrite, tick=tick)
    out.print(
        f"{dst}: {written.weights:,} weights {'converted' if loss is None else 'quantized anew'} to {to}, "
        f"{_size(written.before)} -> {_size(written.after)}, {time.perf_counter() - start:.1f} s"
    )
    out.print("codes and scales keep their values" if loss is None else str(loss))


@app.command()
def inspect(
    src: SrcOrFile,
    device: Annotated[str | None, typer.Option(help="Show what would run on this device of this machine.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Revision = None,
    subfolder: Annotated[str | None, typer.Option(help="The folder of SRC that holds the checkpoint.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Show what a checkpoint holds, and what would run here and why. Reads only headers."""
    from .evaluation.inspection import inspect_source
    from .evaluation.single_file import inspect_file
    from .quantization.source import open_headers

    if device is not None:
        _check_device(device)
    if _is_single_file(src):
        found = inspect_file(src)
    else:
        source = open_headers(src, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code)
        found = inspect_source(source, device)
    if as_json:
        out.print_json(data=found.to_dict())
        return
    out.print(f"{found.folder}: {found.model}, {len(found.files)} file(s), {_size(found.bytes)}")
    table = Table("stored as", "tensors", "bytes", box=None)
    for dtype, count, size in found.dtypes:
        table.add_row(_plain(dtype), f"{count:,}", _size(size))
    out.print(table)
    if found.groups:
        table = Table("group", "scheme", "targets", "matrices", "bytes", box=None)
        for group in found.groups:
            table.add_row(
                _plain(group.name), group.scheme, _plain(", ".join(group.targets)), f"{group.matrices:,}", _size(group.bytes)
            )  # fmt: skip
        out.print(table)
    if found.ignore:
        patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in found.ignore)
        shown = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in patterns.items())
        out.print(f"{'dense' if found.groups else 'would stay dense'}: {shown}")
    out.print(found.summary)
    if found.explanation:
        out.print(found.explanation)
    if found.error:
        err.print(f"error: {found.error}")
        raise typer.Exit(1)


@app.command()
def verify(src: SrcOrFile, revision: Revision = None, trust_remote_code: Trust = False) -> None:
    """Run every check of loading, and look for NaN in the FP8 values, without building the model."""
    from .evaluation.single_file import verify_file
    from .evaluation.verify import verify_source
    from .quantization.files import total_bytes
    from .quantization.source import open_source

    start = time.perf_counter()
    if _is_single_file(src):
        with _bar("reading", Path(src).stat().st_size) as tick:
            checks = verify_file(src, tick)
    else:
        source = open_source(src, revision=revision, trust_remote_code=trust_remote_code)
        with _bar("reading", total_bytes(source.checkpoint)) as tick:
            checks = verify_source(source, tick)
    for check in checks:
        out.print(f"ok: {check}")
    out.print(f"{src}: nothing wrong found, {time.perf_counter() - start:.1f} s")


def _version(value: bool) -> None:
    if value:
        out.print(f"hf-fp8 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def _is_single_file(src: str) -> bool:
    """Whether a path is a file with weights, without a config: as ComfyUI's."""
    return src.endswith(".safetensors") and Path(src).is_file()


def _check_device(device: str) -> None:
    """Raise ConfigError if this machine cannot compute on the device."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # raises for the meta device, too
    except Exception as error:  # torch raises AssertionError, ModuleNotFoundError and others
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--device {device} cannot be used on this machine: {said}") from error


def _schemes(given: list[str]) -> Any:
    """``NAME``, or ``NAME=TARGET`` for each of several groups."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    groups: dict[str, list[str]] = {}
    for entry in given:
        name, equals, target = entry.partition("=")
        if not equals:
            raise typer.BadParameter(f"--scheme {entry}: each of several needs a target, as in FP8_BLOCK='re:.*mlp.*'")
        groups.setdefault(name, []).append(target)
    return groups


@contextmanager
def _bar(what: str, total: int, *, bytes_: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, with the remaining time; yields `tick(count, total=None)`, which advances it."""
    amount = DownloadColumn() if bytes_ else TextColumn("{task.completed:.0f}/{task.total:.0f}")
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count, total=None: progress.update(task, advance=count, total=total)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The command `hf-fp8`. Exits with 1 after an error, 130 if it was interrupted; DST is then unchanged."""
    try:
        signal.signal(signal.SIGTERM, _terminated)
        from transformers.utils import logging as host_logging

        host_logging.set_verbosity_error()
        host_logging.disable_progress_bar()
        logging.getLogger("hf_fp8").setLevel(logging.ERROR)
        code = app(standalone_mode=False)  # typer returns what it would exit with
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except (FP8Error, OSError) as error:
        err.print(f"error: {error}")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted: nothing was written")
        sys.exit(130)
    except Exception as error:
        if show := getattr(error, "show", None):  # of the arguments
            show()
            sys.exit(2)
        if os.environ.get("HF_FP8_TRACEBACK"):
            raise
        err.print(f"error: {type(error).__name__}: {error}\n(HF_FP8_TRACEBACK=1 shows where)")
        sys.exit(1)


if __name__ == "__main__":
    main()
