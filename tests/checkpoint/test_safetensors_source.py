import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, ModelNotFoundError

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "c.weight": np.arange(5, dtype=np.float16),
    "d.scalar": np.array(7, np.int64),
    "e.empty": np.zeros((0, 3), np.float32),
    "f.byte": np.arange(3, dtype=np.uint8),  # leaves what follows it unaligned
    "g.fp8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
}


@pytest.fixture
def single(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names, weight_map = list(TENSORS), {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_in_their_stored_dtypes(kind, request):
    checkpoint = open_checkpoint(str(request.getfixturevalue(kind)))
    assert set(checkpoint.names()) == set(TENSORS)
    for name, expected in TENSORS.items():
        values = checkpoint.read(name)
        assert values.dtype == checkpoint.dtype(name) == expected.dtype
        assert values.shape == checkpoint.shape(name) == expected.shape
        assert checkpoint.num_bytes(name) == expected.nbytes
        np.testing.assert_array_equal(values, expected)


def test_configs(single):
    checkpoint = open_checkpoint(single)
    assert checkpoint.config == {"model_type": "llama"} and checkpoint.generation_config == {"temperature": 0.5}
    assert checkpoint.directory == single


def test_other_dtypes_and_places(single):
    checkpoint = open_checkpoint(single)
    assert checkpoint.read("b.weight", np.float32).dtype == np.float32
    out = np.zeros((4, 6), np.float32)
    checkpoint.read_into("a.weight", out[:, 1:4].T)
    np.testing.assert_array_equal(out[:, 1:4].T, TENSORS["a.weight"])
    with pytest.raises(CheckpointError, match=r"'a\.weight' has shape \(3, 4\), expected \(4, 3\)"):
        checkpoint.read_into("a.weight", np.zeros((4, 3)))
    with pytest.raises(CheckpointError, match="'z' is missing"):
        checkpoint.read("z")
    assert "z" not in checkpoint and "a.weight" in checkpoint


def test_every_truncation_is_named(single):
    data = (single / "model.safetensors").read_bytes()
    for cut in range(len(data)):
        (single / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            open_checkpoint(single)
    (single / "model.safetensors").write_bytes(data[:-2])
    with pytest.raises(CheckpointError, match=r"truncated: tensor '.*' needs bytes up to \d+, the file ends at \d+"):
        open_checkpoint(single)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        [],
        7,
    ],
)
def test_corrupt_entries_are_named(entry, single):
    header = json.dumps({"odd": entry}).encode()
    (single / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="'odd'"):
        open_checkpoint(single)


def test_corrupt_headers(single):
    for data in (bytes(7), b"\xff" * 16, (2).to_bytes(8, "little") + b"[]", (3).to_bytes(8, "little") + b"{a}"):
        (single / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(single)


def test_missing_shard_and_absent_tensor(sharded):
    index = sharded / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"'ghost\.weight' \(model-00001-of-00002\.safetensors\)"):
        open_checkpoint(sharded)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard 'model-00002-of-00002\.safetensors'.* is missing"):
        open_checkpoint(sharded)


def test_shards_outside_the_directory_are_refused(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        open_checkpoint(sharded)
    for text in ("{}", "[]", "{", '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(sharded)


def test_directories_without_weights(single):
    (single / "model.safetensors").unlink()
    checkpoint = open_checkpoint(single)  # enough for random weights
    assert checkpoint.names() == []
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.read("a.weight")
    (single / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        checkpoint.read("a.weight")
    (single / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(single)
    shutil.rmtree(single)
    single.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        open_checkpoint(single)
