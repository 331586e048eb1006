"""Corrupt files end in CheckpointError that names the file, and in nothing else: no crash, no hang, no huge memory."""

import random
import resource
import struct
import time

import gguf
import numpy as np
import pytest

from jaxllm.checkpoint import gguf_config, gguf_format, open_checkpoint
from jaxllm.errors import CheckpointError, JaxllmError, ModelNotFoundError
from jaxllm.text import gguf_tokenizer
from tests.checkpoint import gguf_files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    extra = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [chr(97 + i) for i in range(20)] + ["<s>"],
        "tokenizer.ggml.token_type": [1] * 20 + [3],
        "general.nested": [[1, 2], [3]],
        "general.floats": [0.5, 1.5],
        "general.flag": True,
    }
    gguf_files.write_model(path, "llama", extra=extra)
    return path.read_bytes()


def test_agrees_with_the_gguf_package(model, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(model)
    ours, theirs = gguf_format.GgufFile(path), gguf.GGUFReader(str(path))
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (mine.offset, mine.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        np.testing.assert_array_equal(ours.raw(mine), tensor.data.ravel().view(np.uint8))
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF.") and key != "general.nested":
            expected = field.contents()
            found = ours.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected, key
    assert [part.tolist() for part in ours.metadata["general.nested"]] == [[1, 2], [3]]


def header_end(data: bytes) -> int:
    return data.index(b"output_norm.weight") + 200


def test_every_truncation(model, tmp_path):
    path = tmp_path / "cut.gguf"
    rng = random.Random(0)
    cuts = [*range(64), *rng.sample(range(64, len(model)), 300), len(model) - 1]
    for cut in cuts:
        path.write_bytes(model[:cut])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            open_checkpoint(path)


def open_fully(path):
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.read(name)
    checkpoint.tokenizer()


@pytest.mark.parametrize("seed", range(8))
def test_mutations(seed, model, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "mutated.gguf"
    end = header_end(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.monotonic()
    for _ in range(150):
        data = bytearray(model)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(end)
            if rng.random() < 0.5:
                data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            else:
                value = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1, rng.randrange(2**64)])
                data[at : at + 8] = value.to_bytes(8, "little")
        path.write_bytes(data)
        try:
            with np.errstate(all="ignore"):
                open_fully(path)
        except JaxllmError as error:
            assert str(error)
    assert time.monotonic() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024, "kilobytes"


def field(model: bytes, key: str) -> int:
    """Where the value of a metadata key begins, after its type."""
    return model.index(key.encode()) + len(key) + 4


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**60), "tensor count .* at byte 8"),
        (16, struct.pack("<Q", 2**60), "metadata count .* at byte 16"),
        (24, struct.pack("<Q", 2**40), "metadata key .* at byte 24"),
    ],
)
def test_the_offset_is_named(at, value, message, model, tmp_path):
    data = bytearray(model)
    data[at : at + len(value)] = value
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "bad.gguf")


def test_array_counts_are_bounded(model, tmp_path):
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "general.nested"):
        data = bytearray(model)
        at = field(model, key) + 4
        data[at : at + 8] = (2**61).to_bytes(8, "little")
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{key}.* exceeds what the file holds at byte {at}"):
            open_checkpoint(tmp_path / "bad.gguf")


def test_alignment_and_duplicates(model, tmp_path):
    path = tmp_path / "bad.gguf"
    gguf_files.write_model(path, "llama", extra={"general.alignment": 33})
    with pytest.raises(CheckpointError, match=r"general\.alignment=33"):
        open_checkpoint(path)
    path.write_bytes(model.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight.*twice"):
        open_checkpoint(path)


def test_no_file_and_no_gguf(tmp_path):
    with pytest.raises(ModelNotFoundError):
        gguf_format.GgufFile(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes"):
        open_checkpoint(tmp_path / "empty.gguf")


JUNK = ["x", "", -1, 0, 1, 2**31, 2**63, 0.0, -1.5, float("nan"), float("inf"), True, [], ["a"], [[1]]]
JUNK += [np.zeros(3, "<i4"), np.full(2, np.nan, "<f4"), {}]


@pytest.mark.parametrize("arch", gguf_files.ARCHITECTURES)
def test_fields_of_any_type(arch, tmp_path):
    """Well-formed files whose fields hold anything."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"<0x{i:02X}>" for i in range(256))]
    extra = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": "{{ messages }}",
        f"{arch}.rope.scaling.type": "yarn",
        f"{arch}.rope.scaling.factor": 4.0,
        f"{arch}.rope.scaling.original_context_length": 1024,
        f"{arch}.rope.scaling.attn_factor": 1.0,
        f"{arch}.expert_count": 0,
        f"{arch}.attention.sliding_window": 512,
        "general.sampling.temp": 1.0,
    }
    path = tmp_path / "model.gguf"
    gguf_files.write_model(path, arch, extra=extra)
    file = gguf_format.GgufFile(path)
    gguf_tokenizer.from_gguf(file.metadata, "here", arch)
    original = dict(file.metadata)
    assert len(original) > 30
    for key in original:
        for value in JUNK:
            for model in ("llama", "gpt2"):
                file.metadata = original | {"tokenizer.ggml.model": model, key: value}
                try:
                    gguf_config.make_config(file)
                    gguf_config.make_generation_config(file)
                    gguf_tokenizer.from_gguf(file.metadata, "here", arch)
                except JaxllmError as error:
                    assert str(error)


def test_more_layers_than_tensors(tmp_path):
    gguf_files.write_model(tmp_path / "bad.gguf", "gemma2", extra={"gemma2.block_count": 2**31 - 1})
    with pytest.raises(CheckpointError, match="block_count=2147483647"):
        open_checkpoint(tmp_path / "bad.gguf")
