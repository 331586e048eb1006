"""Reading a part of a tensor gives that part of the whole, from either kind of file, whatever was done to it there."""

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint import Checkpoint, open_checkpoint
from jaxllm.errors import CheckpointError
from tests.checkpoint import gguf_files


def assert_parts(checkpoint: Checkpoint, count: int = 8) -> None:
    rng = np.random.default_rng(0)
    for name in checkpoint.names():
        whole = checkpoint.read(name).astype(np.float32)
        for _ in range(count):
            bounds = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in whole.shape]
            index = tuple(slice(start, stop) for start, stop in bounds)
            expected = whole[index]
            out = np.full(expected.shape[::-1], np.nan, np.float32).T  # any strides
            checkpoint.read_into(name, out, index)
            np.testing.assert_array_equal(out, expected, err_msg=f"{name} {index}")


def test_safetensors(tmp_path, rng):
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": rng.normal(size=(6, 10)), "b": rng.normal(size=7), "c": rng.normal(size=(3, 4, 5))}
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, tmp_path / "model.safetensors")
    assert_parts(open_checkpoint(tmp_path))


@pytest.mark.parametrize("arch", ["llama", "gemma2"])  # rows that are permuted; values that are shifted
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf(arch, kind, tmp_path, monkeypatch):
    weights = gguf_files.hugging_face_weights(arch)
    if arch == "llama":
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            for layer in range(gguf_files.LAYERS):
                bias = np.arange(rows, dtype=np.float32)
                weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = bias
    gguf_files.write_model(tmp_path / "model.gguf", arch, weights, quantization=gguf.GGMLQuantizationType[kind])
    monkeypatch.setattr("jaxllm.checkpoint.gguf_quants.CHUNK_ELEMENTS", 500)  # several chunks a tensor
    assert_parts(open_checkpoint(tmp_path / "model.gguf"))


def test_a_part_of_another_shape_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros((6, 10), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"'a' has shape \(2, 10\) in its part .*, expected \(3, 10\)"):
        checkpoint.read_into("a", np.zeros((3, 10), np.float32), (slice(0, 2), slice(0, 10)))
