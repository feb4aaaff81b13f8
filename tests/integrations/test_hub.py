"""Models from the Hub and to it, by a server on this machine: revisions, folders, caches, broken downloads, access."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import file_download
from safetensors.torch import load as loads
from support.build import differing, error, is_linear, load, logits, tensors, tiny_llama, write
from support.checkpoints import checkpoint
from support.dialects import write_in
from support.fresh import run_fresh
from support.hub_server import TOKEN, HubServer, serving, use
from transformers import AutoModelForCausalLM

from hf_fp8 import FP8Config
from hf_fp8.errors import CorruptFileError, MismatchError
from hf_fp8.nn.linear import QuantizedLinear
from hf_fp8.quantization.source import open_headers

NAME = "user/fp8"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return checkpoint("llama-sharded", tmp_path)


def test_a_sharded_checkpoint(hub: HubServer, sharded: Path) -> None:
    hub.add(NAME, sharded)
    model = load(NAME)
    assert torch.equal(logits(model), logits(load(sharded)))
    codes = [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert codes and all(weight.codes.dtype == torch.float8_e4m3fn for weight in codes)
    assert hub.weights_served() == sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    assert hub.authorized == []
    hub.forget()
    source = open_headers(NAME)  # what was loaded is in the cache
    assert source.checkpoint.tensors.keys() == tensors(sharded).keys() and source.folder.is_dir() and hub.weights_served() == 0


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    found = {}
    for seed in (0, 1):
        write(tiny_llama(seed), tmp_path / str(seed))
        found[seed] = logits(load(tmp_path / str(seed)))
    old = hub.add(NAME, tmp_path / "0")
    new = hub.add(NAME, tmp_path / "1")
    hub.repositories[NAME].refs |= {"v1": old, "refs/pr/1": old}
    assert not torch.equal(found[0], found[1])
    for revision, seed in {None: 1, "main": 1, "v1": 0, "refs/pr/1": 0, old: 0, new: 1}.items():
        where = {} if revision is None else {"revision": revision}
        assert torch.equal(logits(load(NAME, **where)), found[seed]), revision


def test_a_subfolder(hub: HubServer, sharded: Path, fp8: Path, tmp_path: Path) -> None:
    """Another checkpoint is at the root: no file of it is taken."""
    repository = hub.repositories
    hub.add(NAME, fp8)
    both = repository[NAME].commits[repository[NAME].refs["main"]]
    below = {f"quantized/fp8/{path.name}": path.read_bytes() for path in sharded.iterdir()}
    repository[NAME].commit({**both, **below})
    model = load(NAME, subfolder="quantized/fp8")
    assert torch.equal(logits(model), logits(load(sharded)))
    model.save_pretrained(tmp_path / "saved")
    assert differing(tensors(tmp_path / "saved"), tensors(sharded)) == []
    assert torch.equal(logits(load(NAME)), logits(load(fp8)))


def test_a_config_beside_config_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ModelOpt's hf_quant_config.json: from the Hub, of a revision, in a folder, and from the cache."""
    path = tmp_path / "modelopt"
    write_in("modelopt, in its own file", tiny_llama(), path, is_linear)
    expected = logits(load(path))
    with serving() as server:
        use(monkeypatch, server.url, tmp_path / "cache")
        server.add(NAME, path)
        for keep in (FP8Config(backend="weight_only"), None):
            model = load(NAME, keep)
            assert torch.equal(logits(model), expected)
        model.push_to_hub("user/again", token=TOKEN)
        assert torch.equal(logits(load("user/again")), expected)
        repository = server.repositories["user/again"]
        files = repository.commits[repository.refs["main"]]
        assert files["hf_quant_config.json"] == (path / "hf_quant_config.json").read_bytes()
        server.add("user/below", path)
        below = server.repositories["user/below"]
        below.commit({f"fp8/{file.name}": file.read_bytes() for file in path.iterdir()})
        assert torch.equal(logits(load("user/below", subfolder="fp8")), expected)
        tiny_llama().save_pretrained(tmp_path / "dense")
        server.add("user/dense", tmp_path / "dense")
        dense = AutoModelForCausalLM.from_pretrained("user/dense")
        assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())
    assert torch.equal(logits(load(NAME)), expected)  # the connection is refused
    use(monkeypatch, server.url, tmp_path / "cache", offline=True)
    assert torch.equal(logits(load(NAME)), expected)
    AutoModelForCausalLM.from_pretrained("user/dense")


def test_the_config_of_a_model_that_was_dequantized(
    hub: HubServer, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It no longer says that the repository is in FP8. Codes are never values."""
    hub.add(NAME, sharded)
    model = load(NAME, FP8Config(dequantize=True))
    passed = {"config": model.config, "dtype": torch.float32}
    again = AutoModelForCausalLM.from_pretrained(NAME, **passed)
    assert error(logits(again), logits(model)) < 1e-6
    use(monkeypatch, hub.url, tmp_path / "other")  # config.json is not in this cache
    with pytest.raises(MismatchError, match="the scales would be dropped"):
        AutoModelForCausalLM.from_pretrained(NAME, **passed)


def test_from_the_cache_after_the_server_has_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: Path) -> None:
    with serving() as server:
        use(monkeypatch, server.url, tmp_path / "cache")
        server.add(NAME, sharded)
        expected = logits(load(NAME))
    assert torch.equal(logits(load(NAME, local_files_only=True)), expected)
    assert torch.equal(logits(load(NAME)), expected)  # the connection is refused
    use(monkeypatch, server.url, tmp_path / "cache", offline=True)
    model = load(NAME)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert differing(tensors(tmp_path / "saved"), tensors(sharded)) == []
    use(monkeypatch, server.url, tmp_path / "empty", offline=True)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        load(NAME)


def test_a_download_that_breaks_off(hub: HubServer, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that closes is opened again at the byte that comes next. If it always closes, nothing is loaded."""
    shard = "model-00002-of-00003.safetensors"
    size = (sharded / shard).stat().st_size
    hub.add(NAME, sharded)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cuts[shard] = 40_000
    with pytest.raises(Exception, match="closed connection without sending complete message"):
        load(NAME)
    assert len(hub.ranges[shard]) > 1 and not list((tmp_path / "cache").rglob(f"snapshots/*/{shard}"))
    hub.forget()
    hub.cuts.clear()
    assert torch.equal(logits(load(NAME)), logits(load(sharded)))
    assert hub.served == {shard: size}  # what had arrived before was not sent again

    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    shutil.rmtree(tmp_path / "cache")
    hub.forget()
    hub.cuts[shard] = 40_000
    assert torch.equal(logits(load(NAME)), logits(load(sharded)))
    first, second = hub.ranges[shard]
    assert first == "" and 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 40_000


def test_a_file_that_arrives_short(hub: HubServer, sharded: Path) -> None:
    """The server says that it has sent everything."""
    hub.add(NAME, sharded)
    hub.short["model-00002-of-00003.safetensors"] = 40_000
    with pytest.raises(OSError, match="should be of size 57328 but has size 40000"):
        load(NAME)


def test_a_truncated_file_in_the_cache(hub: HubServer, sharded: Path, tmp_path: Path) -> None:
    hub.add(NAME, sharded)
    load(NAME)
    (shard,) = (tmp_path / "cache").rglob("snapshots/*/model-00002-of-00003.safetensors")
    content = shard.read_bytes()
    for cut in (len(content) - 1, 100, 0):
        shard.resolve().write_bytes(content[:cut])
        with pytest.raises(CorruptFileError, match=r"model-00002-of-00003.safetensors.* truncated"):
            load(NAME)


@pytest.mark.parametrize("name", ["llama-sharded", "llama-block", "mixtral-dyn"])
def test_push(name: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pushed is what was loaded, byte for byte."""
    folder = checkpoint(name, tmp_path)
    use(monkeypatch, hub.url, tmp_path / "cache", token=TOKEN)
    model = load(folder, FP8Config(backend="weight_only", experts="fp8"))
    model.push_to_hub("user/pushed", max_shard_size="60KB")
    pushed = hub.repositories["user/pushed"]
    files = pushed.commits[pushed.refs["main"]]
    assert {"config.json", "README.md"} <= set(files)
    assert sum(path.endswith(".safetensors") for path in files) > 1
    sent = {
        key: value for path, content in files.items() if path.endswith(".safetensors") for key, value in loads(content).items()
    }
    assert differing(sent, tensors(folder)) == []
    again = load("user/pushed", FP8Config(backend="weight_only", experts="fp8"))
    assert torch.equal(logits(again), logits(model))
    hub.forget()
    again.push_to_hub("user/pushed", max_shard_size="60KB", revision="again", commit_message="the same")
    assert {p: c for p, c in pushed.commits[pushed.refs["again"]].items() if p.endswith(".safetensors")} == {
        p: c for p, c in files.items() if p.endswith(".safetensors")
    }


def test_what_was_quantized_while_loading_is_pushed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a dense repository to an FP8 one; a private one."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    hub.add("user/dense", tmp_path / "dense")
    use(monkeypatch, hub.url, tmp_path / "cache", token=TOKEN)
    model = load("user/dense", FP8Config("FP8_DYNAMIC"), dtype=torch.bfloat16)
    model.push_to_hub("user/new", private=True)
    assert hub.repositories["user/new"].private
    again = load("user/new", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "other")
    assert differing(tensors(tmp_path / "one"), tensors(tmp_path / "other")) == []
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in tensors(tmp_path / "other").values()}


def test_a_private_repository(hub: HubServer, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, sharded, private=True)
    with pytest.raises(OSError, match="private repository"):
        load(NAME)
    with pytest.raises(OSError, match="private repository"):
        load(NAME, token="hf_other")
    assert hub.weights_served() == 0
    assert torch.equal(logits(load(NAME, token=TOKEN)), logits(load(sharded)))
    use(monkeypatch, hub.url, tmp_path / "other", token=TOKEN)
    assert torch.equal(logits(load(NAME)), logits(load(sharded)))
    assert hub.authorized == []  # the address of large files does not get the token


def test_what_is_not_there(hub: HubServer, sharded: Path) -> None:
    with pytest.raises(OSError, match="user/none is not a local folder and is not a valid model identifier"):
        load("user/none")
    hub.add(NAME, sharded)
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        load(NAME, revision="v2")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    hub.add(NAME, sharded)
    with pytest.raises(OSError, match=r"does not appear to have a file named model-00002-of-00003.safetensors"):
        load(NAME)
    hub.add(NAME, sharded, gated=True)
    with pytest.raises(OSError, match="gated repo"):
        load(NAME)


ONLINE = """
import torch
from support.build import load, logits
import hf_fp8
torch.save(logits(load("user/fp8")), "online.pt")
"""
OFFLINE = """
import torch
from support.build import load, logits
import hf_fp8
assert torch.equal(logits(load("user/fp8")), torch.load("online.pt"))
"""
INSPECT = """
import sys
from hf_fp8.cli import main
sys.argv = ["hf-fp8", "inspect", "user/fp8"]
try:
    main()
except SystemExit as done:
    assert not done.code
"""


@pytest.mark.slow
def test_by_the_environment(tmp_path: Path, sharded: Path) -> None:
    """As a user does it: HF_ENDPOINT and HF_HUB_OFFLINE are set before Python starts."""
    env = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(map(str, Path(__file__).parents[1:3]))}
    with serving() as server:
        server.add(NAME, sharded)
        said = run_fresh({"inspect": INSPECT}, tmp_path, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", **env)["inspect"]
        assert "user/fp8: LlamaForCausalLM, 3 file(s)" in said
        run_fresh({"online": ONLINE}, tmp_path, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", **env)
        assert torch.equal(torch.load(tmp_path / "online.pt"), logits(load(sharded)))
    scripts = {"offline": OFFLINE, "inspect": INSPECT}
    said = run_fresh(scripts, tmp_path, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1", **env)["inspect"]
    assert "LlamaForCausalLM, 3 file(s)" in said
