import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint import gguf_files


@pytest.mark.parametrize("arch", gguf_files.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_in_hugging_face_terms(arch, tied, tmp_path):
    weights = gguf_files.hugging_face_weights(arch, tied=tied)
    gguf_files.write_model(tmp_path / "model.gguf", arch, weights)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert set(checkpoint.names()) == set(weights)
    assert checkpoint.config["tie_word_embeddings"] is tied
    for name, expected in weights.items():
        assert checkpoint.shape(name) == expected.shape
        assert name in checkpoint
        # Gemma's norms lose a bit when 1 is added and taken away
        np.testing.assert_allclose(checkpoint.read(name), expected, rtol=0, atol=1e-6 if "norm" in name else 0)


def test_llama_biases_are_unpermuted(tmp_path):
    weights = gguf_files.hugging_face_weights("llama")
    rng = np.random.default_rng(1)
    for layer in range(gguf_files.LAYERS):
        for name, rows in (("q", 64), ("k", 32), ("v", 32)):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = rng.normal(size=rows).astype(np.float32)
    gguf_files.write_model(tmp_path / "model.gguf", "llama", weights)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.config["attention_bias"] is True
    for name in weights:
        np.testing.assert_array_equal(checkpoint.read(name), weights[name])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_type_through_a_file(kind, tmp_path):
    quantization = gguf.GGMLQuantizationType[kind]
    weights = gguf_files.write_model(tmp_path / "model.gguf", "llama", quantization=quantization)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    for name, original in weights.items():
        if original.ndim != 2:
            continue
        stored = gguf_files.gguf_tensor(name, original, "llama")[1]
        expected = gguf.quants.dequantize(gguf.quants.quantize(stored, quantization), quantization)
        for part, heads in (("q_proj", gguf_files.HEADS), ("k_proj", gguf_files.KV_HEADS)):
            if part in name:  # undo the permutation by the converter's formula read backwards
                expected = expected.reshape(heads, -1, 2, expected.shape[1]).swapaxes(1, 2).reshape(expected.shape)
        values = checkpoint.read(name)
        assert values.dtype == checkpoint.dtype(name) == np.dtype(dtype)
        np.testing.assert_array_equal(values.astype(np.float32), expected)


def test_k_quants_through_a_file(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "qwen2")
    gguf_files.add_metadata(writer, "qwen2", {})
    stored = {}
    for layer, kind in enumerate(kinds):
        quantization = gguf.GGMLQuantizationType[kind]
        blocks = rng.integers(0, 64, (4, 512 // 256 * gguf.GGML_QUANT_SIZES[quantization][1]), dtype=np.uint8)
        stored[f"model.layers.{layer}.mlp.down_proj.weight"] = gguf.quants.dequantize(blocks, quantization)
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", blocks, raw_dtype=quantization)
    writer.add_tensor("token_embd.weight", rng.normal(size=(48, 64)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    for name, expected in stored.items():
        np.testing.assert_array_equal(checkpoint.read(name), expected)


def test_read_into_any_strides_and_dtype(tmp_path):
    weights = gguf_files.write_model(tmp_path / "model.gguf", "llama")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
    rows = gguf_files.HIDDEN
    fused = np.zeros((rows, weights[q].shape[0] + weights[k].shape[0]), "float16")  # [in, out], q beside k
    checkpoint.read_into(q, fused[:, : weights[q].shape[0]].T)
    checkpoint.read_into(k, fused[:, weights[q].shape[0] :].T)
    np.testing.assert_array_equal(fused.T, np.concatenate([weights[q], weights[k]]).astype("float16"))
    assert checkpoint.read(q, "bfloat16").dtype == np.dtype("bfloat16")
    with pytest.raises(CheckpointError, match=r"q_proj.*shape \(64, 64\), expected \(64, 63\)"):
        checkpoint.read_into(q, np.zeros((64, 63)))
    with pytest.raises(CheckpointError, match="'nothing' is missing"):
        checkpoint.read("nothing")


def test_rows_beyond_one_chunk(tmp_path):
    weights = gguf_files.hugging_face_weights("llama")
    weights["model.embed_tokens.weight"] = np.random.default_rng(0).normal(size=(3001, 64)).astype(np.float32)
    gguf_files.write_model(tmp_path / "model.gguf", "llama", weights)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight"), weights["model.embed_tokens.weight"])
    assert checkpoint.config["vocab_size"] == 3001


def test_unknown_tensors_keep_their_names(tmp_path):
    gguf_files.write_model(tmp_path / "model.gguf", "llama", extra_tensors={"blk.0.odd.weight": np.ones(3, np.float32)})
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert "blk.0.odd.weight" in checkpoint.names()


def test_unsupported_types_and_architectures_are_named(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "iq.gguf"), "llama")
    gguf_files.add_metadata(writer, "llama", {})
    writer.add_tensor("token_embd.weight", np.ones((48, 64), np.float32))
    kind = gguf.GGMLQuantizationType.IQ4_XS
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 136), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn_up\.weight.*IQ4_XS.*Q6_K"):
        open_checkpoint(tmp_path / "iq.gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "bert.gguf"), "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'bert'.*llama"):
        open_checkpoint(tmp_path / "bert.gguf")
    gguf_files.write_model(tmp_path / "moe.gguf", "llama", extra={"llama.expert_count": 8})
    with pytest.raises(UnsupportedModelError, match="experts"):
        open_checkpoint(tmp_path / "moe.gguf")


@pytest.mark.parametrize("arch", gguf_files.ARCHITECTURES)
def test_equals_what_transformers_reads(arch, tmp_path):
    """The golden is made by scripts/make_gguf_goldens.py."""
    golden = json.loads((Path(__file__).parent / "goldens" / "gguf.json").read_text())[arch]
    weights = gguf_files.hugging_face_weights(arch, tied=arch.startswith("gemma"))
    gguf_files.write_model(tmp_path / "model.gguf", arch, weights)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert set(checkpoint.names()) == set(golden["tensors"])
    for name, expected in golden["tensors"].items():
        flat = checkpoint.read(name, np.float64).ravel()
        assert list(checkpoint.shape(name)) == expected["shape"]
        np.testing.assert_allclose(flat.sum(), expected["sum"], atol=1e-3)
        np.testing.assert_allclose(flat[:: len(flat) // 7], expected["values"], atol=1e-6)
    for field, expected in golden["config"].items():
        assert checkpoint.config.get(field) == pytest.approx(expected), field
