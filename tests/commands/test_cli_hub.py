"""`hf-fp8` and repositories on the Hub: `inspect` reads headers without downloading weights; revisions; errors."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from support.build import differing, is_linear, tensors, tiny_llama, write
from support.checkpoints import FOLDERS, checkpoint
from support.commands import run
from support.dialects import write_in
from support.hub_server import TOKEN, HubServer, use

from hf_fp8.checkpoint import hub as remote
from hf_fp8.checkpoint.hub import HubFolder
from hf_fp8.checkpoint.reader import Checkpoint
from hf_fp8.checkpoint.weight_files import find_weight_files
from hf_fp8.errors import CheckpointError

NAME = "user/fp8"
Said = Callable[..., str]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Said:
    """What `hf-fp8 inspect` prints. code: with which it ends; then what is printed is the error."""

    def of(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        run("inspect", *arguments, code=code)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.err if code else said.out

    return of


def wide(path: Path, shard: str = "300KB") -> Path:
    """A sharded FP8 checkpoint with files of 300 kB."""
    write(tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=512), path / "one")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(path / "one").save_pretrained(path / "fp8", max_shard_size=shard)
    return path / "fp8"


@pytest.mark.parametrize("name", ["modelopt, in its own file", "deepseek"])
def test_other_libraries_checkpoints(name: str, hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    path = tmp_path / "fp8"
    write_in(name, tiny_llama(), path, is_linear)
    hub.add(NAME, path)
    below = inspect(path).partition(":")[2]
    assert inspect(NAME).partition(":")[2] == below and "format; from_pretrained" in below
    run("convert", NAME, tmp_path / "new", "--to", "compressed-tensors", "--revision", "main")
    run("verify", tmp_path / "new")


def test_only_headers_are_downloaded(hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    folder = wide(tmp_path)
    weights = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert len(weights) > 4 and sum(weights.values()) > 1_500_000
    hub.add(NAME, folder)
    for option in ((), ("--json",)):
        hub.forget()
        assert inspect(NAME, *option) == inspect(folder, *option).replace(str(folder), NAME)
        assert {path: hub.served[path] for path in weights} == {path: min(2**16, size) for path, size in weights.items()}
        assert all(len(hub.ranges[path]) == 1 for path in weights)
    assert set(hub.served) <= {"config.json", "model.safetensors.index.json", *weights}
    assert hub.authorized == []
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_headers_that_are_longer_than_what_is_read_first(
    hub: HubServer, inspect: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the header is read, and nothing behind it."""
    folder = wide(tmp_path)
    hub.add(NAME, folder)
    expected = inspect(folder).replace(str(folder), NAME)
    for first in (64, 100):
        monkeypatch.setattr(remote, "_FIRST", first)
        hub.forget()
        assert inspect(NAME) == expected
        for file in folder.glob("*.safetensors"):
            length = int.from_bytes(file.read_bytes()[:8], "little") + 8
            assert hub.served[file.name] == length and len(hub.ranges[file.name]) == 2


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_said_is_what_is_said_of_the_folder(name: str, hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path)
    hub.add(NAME, folder)
    assert json.loads(inspect(NAME, "--json")) == json.loads(inspect(folder, "--json").replace(str(folder), NAME))


def test_a_dense_repository(hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    tiny_llama(hidden_size=256, intermediate_size=512).save_pretrained(tmp_path / "dense")
    hub.add(NAME, tmp_path / "dense")
    said = inspect(NAME)
    assert said == inspect(tmp_path / "dense").replace(str(tmp_path / "dense"), NAME)
    assert "not quantized: FP8_DYNAMIC would make 14 matrices FP8" in said
    assert hub.weights_served() == 2**16


def test_revisions_and_subfolders(hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    fp8, other = checkpoint("llama-sharded", tmp_path), checkpoint("llama-block", tmp_path)
    old = hub.add(NAME, fp8)
    hub.add(NAME, other)
    hub.repositories[NAME].refs["v1"] = old
    assert "128x128" in inspect(NAME)
    for revision in ("v1", old):
        assert inspect(NAME, "--revision", revision) == inspect(fp8).replace(str(fp8), f"{NAME}@{revision}")
    hub.add("user/both", fp8, below="deep/er/")
    for subfolder in ("deep/er", "deep/er/"):
        assert inspect("user/both", "--subfolder", subfolder) == inspect(fp8).replace(str(fp8), "user/both/deep/er")
    assert "has no config.json" in inspect("user/both", code=1)
    assert "has no folder 'shallow'" in inspect("user/both", "--subfolder", "shallow", code=1)
    assert inspect(fp8.parent, "--subfolder", fp8.name) == inspect(fp8)
    assert "only a repository on the Hub has a revision" in inspect(fp8, "--revision", "v1", code=1)


def test_a_repository_in_the_cache(hub: HubServer, inspect: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama-sharded", tmp_path)
    hub.add(NAME, folder)
    expected = inspect(NAME)
    use(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    assert "HF_HUB_OFFLINE is set" in inspect(NAME, code=1)  # of the weights nothing is in the cache
    use(monkeypatch, hub.url, tmp_path / "cache")
    here = snapshot_download(NAME)
    hub.forget()
    assert inspect(NAME).replace(here, NAME) == expected and hub.weights_served() == 0
    use(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    assert inspect(NAME).replace(here, NAME) == expected
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # nobody listens there
    assert inspect(NAME).replace(here, NAME) == expected
    use(monkeypatch, hub.url, tmp_path / "cache")
    hub.is_down = True
    assert inspect(NAME).replace(here, NAME) == expected
    assert "answered with HTTP 503" in inspect("user/other", code=1)
    hub.is_down = False
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    shutil.rmtree(next((tmp_path / "cache").rglob("refs")))
    assert "cannot be reached" in inspect(NAME, code=1)
    use(monkeypatch, hub.url, tmp_path / "cache")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    hub.add(NAME, folder)  # what is in the cache is another commit
    assert inspect(NAME) == expected and hub.weights_served() > 0


def test_pickles(hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    folder = checkpoint("llama-dyn", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add(NAME, folder)
    said = inspect(NAME, "--revision", "main", code=1)
    assert "pytorch_model.bin has no header" in said and f"`hf download {NAME} --revision main`" in said
    assert hub.weights_served() == 0
    here = snapshot_download(NAME)
    assert inspect(NAME) == inspect(folder).replace(str(folder), here)
    shutil.copy(checkpoint("llama-block", tmp_path) / "model.safetensors", folder)
    hub.add(NAME, folder)
    snapshot_download(NAME, allow_patterns=["config.json", "*.bin"])  # which are not what is loaded now
    assert inspect(NAME, code=1) == inspect(folder, code=1).replace(str(folder), NAME)


def test_errors_are_those_of_the_folder(hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    """Damaged files: the same checks on the same headers."""
    folder = checkpoint("llama-sharded", tmp_path)
    shard = folder / "model-00002-of-00003.safetensors"
    content, index = shard.read_bytes(), (folder / "model.safetensors.index.json").read_text()

    def check(word: str) -> None:
        hub.add(NAME, folder)
        expected = inspect(folder, code=1)
        assert word in expected and inspect(NAME, code=1) == expected.replace(str(folder), NAME)

    for damaged, word in {
        content[:-1]: "truncated", content[:100]: "claims a header", content[:5]: "5 bytes", b"": "0 bytes",
        content + b"x": "describes", content.replace(b'"BF16"', b'"BF61"', 1): "does not know",
        b"version https://git-lfs.github.com/spec/v1\n": "LFS pointer",
        content[:8] + b"!" + content[9:]: "JSON", content.replace(b'"shape":[', b'"shape":7', 1): "JSON",
    }.items():  # fmt: skip
        shard.write_bytes(damaged)
        check(word)
    shard.unlink()
    check("download what is missing")
    shard.write_bytes(content)
    broken = json.loads(index)
    (folder / "model.safetensors.index.json").write_text("{")
    check("JSON")
    moved = next(name for name, file in broken["weight_map"].items() if "norm" in name and file == shard.name)
    broken["weight_map"][moved] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(broken))
    check(moved)
    (folder / "model.safetensors.index.json").write_text(index)
    shutil.copy(shard, folder / "model.safetensors")
    check("Delete model.safetensors.index.json")
    (folder / "model.safetensors").rename(folder / "shard-00000-model-00001-of-00002.safetensors")
    check("distributed checkpoint")
    (folder / "shard-00000-model-00001-of-00002.safetensors").rename(folder / "adapter_config.json")
    check("adapter_config.json")
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text("[]")
    check("config.json")
    (folder / "config.json").unlink()
    check("no config.json")


def test_a_tensor_in_two_files(hub: HubServer, inspect: Said, tmp_path: Path) -> None:
    """Their values are compared, as for a folder: those of this tensor are read."""
    folder = checkpoint("llama-sharded", tmp_path)
    one, other = folder / "model-00001-of-00003.safetensors", folder / "model-00003-of-00003.safetensors"
    name, tensor = next(iter(load_file(one).items()))
    for twice in (tensor, tensor * 0):
        save_file(load_file(other) | {name: twice}, other, metadata={"format": "pt"})
        hub.add(NAME, folder)
        code = int(twice is not tensor)
        assert inspect(NAME, code=code) == inspect(folder, code=code).replace(str(folder), NAME)


def test_values_are_read_by_ranges(hub: HubServer, tmp_path: Path) -> None:
    folder = wide(tmp_path)
    hub.add(NAME, folder)
    source = HubFolder(NAME)
    files = sorted(folder.glob("*.safetensors"))
    checkpoint_there = Checkpoint([str(source.root / file.name) for file in files], source)
    hub.forget()
    assert differing(checkpoint_there.read(list(checkpoint_there.tensors)), tensors(folder)) == []
    hub.forget()
    name = "model.layers.1.mlp.down_proj.weight_scale"
    found = checkpoint_there.load(name)
    assert torch.equal(found, tensors(folder)[name]) and hub.weights_served() <= found.nbytes


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OtherConfig(LlamaConfig):
    model_type = "other_llama"
class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""


def test_code_of_a_revision(hub: HubServer, inspect: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run if it is trusted, as it is in that commit."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder = checkpoint("llama-sharded", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "other_llama", "architectures": ["OtherForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "code.OtherConfig", "AutoModelForCausalLM": "code.OtherForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE)
    hub.add(NAME, folder, branch="v1")
    hub.repositories[NAME].commit({"code.py": b"raise SystemError('of another commit')"})
    assert "contains custom code" in inspect(NAME, "--revision", "v1", code=1)
    assert "code.py" not in hub.served and not (tmp_path / "modules").exists()
    said = inspect(NAME, "--revision", "v1", "--trust-remote-code")
    assert said == inspect(folder, "--trust-remote-code").replace(str(folder), f"{NAME}@v1")
    assert "OtherForCausalLM" in said and "channel x token" in said


def test_a_repository_that_changes_meanwhile(hub: HubServer, tmp_path: Path) -> None:
    """All that is read is of the commit that was listed."""
    folder, other = checkpoint("llama-sharded", tmp_path), checkpoint("llama-block", tmp_path)
    hub.add(NAME, folder)
    source = HubFolder(NAME)
    hub.add(NAME, other)
    files = find_weight_files(source.root, fs=source)
    assert files is not None
    found = Checkpoint(list(map(str, files.files)), source)
    assert differing(found.read(list(found.tensors)), tensors(folder)) == []
    assert source.here(source.root / "config.json").read_text() == (folder / "config.json").read_text()


def test_answers_that_are_not_the_ranges(
    hub: HubServer, inspect: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes from another place would be a wrong header."""
    folder = wide(tmp_path)
    hub.add(NAME, folder)
    shard = sorted(folder.glob("*.safetensors"))[0].name
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    hub.cuts[shard] = 30
    assert "closed connection" in inspect(NAME, code=1)
    assert len(hub.ranges[shard]) == 3
    del hub.cuts[shard]
    hub.short[shard] = 30
    assert "sent 30 bytes instead of 65,536" in inspect(NAME, code=1)
    del hub.short[shard]
    source = HubFolder(NAME)
    source._sizes[shard] += 1  # the list of files and the file differ
    with pytest.raises(CheckpointError, match="instead of bytes 0-9/"):
        source.part(shard, 0, 10)
    hub.knows_ranges = False
    assert inspect(NAME) == inspect(folder).replace(str(folder), NAME)  # small files are read as a whole
    monkeypatch.setattr(remote, "_SMALL", 100_000)
    assert "is not sent in parts (HTTP 200)" in inspect(NAME, code=1)


def test_access(hub: HubServer, inspect: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama-sharded", tmp_path)
    hub.add(NAME, folder, private=True)
    hub.add("user/gated", folder, gated=True)

    def sentence(name: str, *arguments: str) -> str:
        said = inspect(name, *arguments, code=1)
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "was not found on the Hub" in sentence(NAME) and hub.weights_served() == 0
    use(monkeypatch, hub.url, tmp_path / "other", token="hf_wrong")
    assert "was not found on the Hub" in sentence(NAME)
    use(monkeypatch, hub.url, tmp_path / "cache", token=TOKEN)
    assert inspect(NAME) == inspect(folder).replace(str(folder), NAME) and hub.authorized == []
    assert "user/gated is gated: ask for access" in sentence("user/gated")
    assert "was not found on the Hub" in sentence("user/none")
    assert "has no revision 'v9'" in sentence(NAME, "--revision", "v9")
    assert "neither a folder nor the name of a repository" in sentence("user/a b")
    assert "neither a folder nor the name of a repository" in sentence("a/b/c")
    hub.repositories["user/empty"] = type(hub.repositories[NAME])()
    hub.repositories["user/empty"].commit({})
    assert "has no files" in sentence("user/empty")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    assert "http://127.0.0.1:9) cannot be reached" in sentence("user/none")
    use(monkeypatch, hub.url, tmp_path / "cache", offline=True)
    assert "HF_HUB_OFFLINE is set" in sentence("user/none")


def test_commands_that_download(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        tiny_llama(seed).save_pretrained(tmp_path / f"dense{seed}")
        hub.add("user/dense", tmp_path / f"dense{seed}")
        run("quantize", tmp_path / f"dense{seed}", tmp_path / f"fp8{seed}")
        hub.add(NAME, tmp_path / f"fp8{seed}")
        for repository in hub.repositories.values():
            repository.refs[f"v{seed}"] = repository.refs["main"]
    for seed, revision in enumerate((["--revision", "v0"], [])):
        run("quantize", "user/dense", tmp_path / f"q{seed}", *revision)
        assert differing(tensors(tmp_path / f"q{seed}"), tensors(tmp_path / f"fp8{seed}")) == []
        run("verify", NAME, *revision)
        run("dequantize", NAME, tmp_path / f"d{seed}", *revision)
        run("dequantize", tmp_path / f"fp8{seed}", tmp_path / f"e{seed}")
        assert differing(tensors(tmp_path / f"d{seed}"), tensors(tmp_path / f"e{seed}")) == []
    assert differing(tensors(tmp_path / "q0"), tensors(tmp_path / "q1")) != []

    def refused(word: str, *arguments: object) -> None:
        capsys.readouterr()
        run(*arguments, code=1)
        said = capsys.readouterr().err
        assert word in said and said.startswith("error: ") and said.count("\n") == 1, said

    refused("has no revision 'v9'", "verify", NAME, "--revision", "v9")
    refused("was not found on the Hub", "verify", "user/none")
    refused("only a repository on the Hub has a revision", "verify", tmp_path / "fp80", "--revision", "v0")
    use(monkeypatch, hub.url, tmp_path / "other", offline=True)
    refused("HF_HUB_OFFLINE is set", "verify", NAME)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "other")
    refused("cannot be reached", "quantize", "user/dense", tmp_path / "x")
