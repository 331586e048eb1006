"""Ids and texts against Hugging Face Transformers and SentencePiece; goldens by scripts/make_text_goldens.py."""

import json
import shutil

import numpy as np
import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from jaxllm.text import gguf_tokenizer, tokenizer_files
from tests.text.conftest import GOLDENS, load_golden, sentencepiece_metadata

SMOLLM2 = load_golden("smollm2.json")
SENTENCEPIECE = load_golden("sentencepiece.json")
TINY = load_golden("tiny_bpe.json")


def test_default_model_ids(smollm2):
    for text, ids in zip(SMOLLM2["texts"], SMOLLM2["ids"], strict=True):
        assert smollm2.encode(text) == ids, text
    assert smollm2.encode_batch(SMOLLM2["texts"]) == SMOLLM2["ids"]
    assert smollm2.encode_batch([]) == []


def test_default_model_texts(smollm2):
    for ids, text, plain in zip(SMOLLM2["ids"], SMOLLM2["decoded"], SMOLLM2["decoded_without_special"], strict=True):
        assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert smollm2.decode(ids) == plain


def test_default_model_special_tokens(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (49152, 1, 2, 2)
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.id_to_token(2) == "<|im_end|>" == smollm2.token_text(2)
    assert smollm2.token_to_id("<|im_end|>") == 2
    assert smollm2.id_to_token(49152) is None and smollm2.id_to_token(-1) is None
    assert smollm2.token_to_id("no such token") is None


@pytest.mark.parametrize("pre", list(SMOLLM2["splits"]))
def test_cuts_of_other_models(pre):
    """The default vocabulary under other models' rules for cutting text."""
    metadata = open_checkpoint("smollm2")._file.metadata | {"tokenizer.ggml.pre": pre}
    tokenizer = gguf_tokenizer.from_gguf(metadata, "golden", "llama")
    for text, ids in zip(SMOLLM2["texts"], SMOLLM2["splits"][pre], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


def byte_level_metadata(**changes):
    tokens = ["a", "b", "ab", "<s>", "</s>", "e", "Ì", "ģ", "Ã", "©", "Ã©"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3, 4] + [1] * 6, np.int32),
        "tokenizer.ggml.merges": ["a b", "Ã ©"],
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 4,
        **changes,
    }


def test_gguf_flags():
    def encode(text="ab", **changes):
        changes = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        return gguf_tokenizer.from_gguf(byte_level_metadata(**changes), "here").encode(text)

    assert encode() == [2]
    assert encode(add_bos_token=True) == [3, 2]
    assert encode(add_bos_token=True, add_eos_token=True) == [3, 2, 4]
    assert encode(pre="llama-bpe") == [3, 2] and encode(pre="llama-bpe", add_bos_token=False) == [2]
    assert encode("e\u0301", pre="qwen2") == [10], "composed first"
    assert encode("e\u0301", pre="llama-bpe", add_bos_token=False) == [5, 6, 7]
    assert encode("ab", pre="tekken", merges=["Ã ©"]) == [2], "a piece that is a token is taken whole"
    tokenizer = gguf_tokenizer.from_gguf(byte_level_metadata(), "here")
    assert tokenizer.encode("a<s>b</s>") == [0, 3, 1, 4]
    assert tokenizer.decode([0, 3, 1, 4]) == "ab</s>", "a user-defined token is no special one"


def test_gguf_tokenizers_that_cannot_be_built():
    def build(**changes):
        changes = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        return gguf_tokenizer.from_gguf(byte_level_metadata(**changes), "file.gguf")

    with pytest.raises(UnsupportedModelError, match=r"file\.gguf.*pre='odd'.*qwen2"):
        build(pre="odd")
    with pytest.raises(UnsupportedModelError, match="'t5'"):
        build(model="t5")
    with pytest.raises(CheckpointError, match="2 tokens, of which 1 are distinct"):
        build(tokens=["a", "a"], token_type=np.ones(2, np.int32))
    with pytest.raises(CheckpointError, match="token_type"):
        build(token_type=np.ones(2, np.int32))
    with pytest.raises(CheckpointError, match="merges"):
        build(merges=["a z"])
    with pytest.raises(CheckpointError, match="no tokenizer"):
        gguf_tokenizer.from_gguf({}, "file.gguf")
    with pytest.raises(CheckpointError, match="scores is missing"):
        build(model="llama", merges=[])


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepiece(name):
    golden = SENTENCEPIECE["models"][name]
    metadata = sentencepiece_metadata(golden)
    if name == "gemma":
        metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = gguf_tokenizer.from_gguf(metadata, "golden", "llama")
    for text, ids, decoded in zip(SENTENCEPIECE["texts"], golden["ids"], golden["decoded"], strict=True):
        if "<|" not in text:
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if text.strip():  # of nothing but spaces SentencePiece gives back fewer
            assert tokenizer.decode(ids) == decoded == text
        assert tokenizer.encode(text)[0] == 1, "llama files without a flag begin with the bos token"


def test_gemma_merges_by_the_order_of_its_tokens():
    tokens = ["<unk>", "a", "b", "c", "bc", "ab", "  ", *(f"<0x{i:02X}>" for i in range(256))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0, 0, 0, 0, -9, -1, 0] + [0] * 256, np.float32),
        "tokenizer.ggml.token_type": np.array([2] + [1] * 5 + [4] + [6] * 256, np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    gemma = gguf_tokenizer.from_gguf(metadata, "here", "gemma2")
    llama = gguf_tokenizer.from_gguf(metadata | {"tokenizer.ggml.add_space_prefix": False}, "here", "llama")
    assert gemma.encode("abc") == [1, 4] and llama.encode("abc") == [5, 3]
    assert gemma.vocab_size == len(tokens), "a run of spaces is no new token"


@pytest.mark.parametrize("name", ["plain", "bos_and_eos", "none"])
def test_directory(name, tmp_path):
    shutil.copytree(GOLDENS / "tiny_bpe", tmp_path, dirs_exist_ok=True)
    config = load_golden("tiny_bpe/tokenizer_config.json") | TINY[name]["changes"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_files.from_directory(tmp_path)
    for text, ids in zip(TINY["texts"], TINY[name]["ids"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert sorted(tokenizer.special_ids) == TINY["specials"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.encode("<think>", add_special_tokens=False) == [330]
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<|bos|>hi<|end|>"
    assert tokenizer.apply_chat_template(messages, tools=[{"a": 1}]) == 'tools:[{"a": 1}]'


def test_directory_files_that_override(tmp_path):
    shutil.copytree(GOLDENS / "tiny_bpe", tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"332": {"content": "<x>", "special": true}}, "chat_template": "config"}'
    )
    tokenizer = tokenizer_files.from_directory(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "file"
    assert tokenizer.token_to_id("<x>") == 332 and 332 in tokenizer.special_ids
    assert tokenizer.pad_token_id == 333 and tokenizer.vocab_size == 334


def test_directories_that_hold_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        tokenizer_files.from_directory(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model \(SentencePiece\)"):
        tokenizer_files.from_directory(tmp_path)
    for text in ("", "{", "{}", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            tokenizer_files.from_directory(tmp_path)
    shutil.copy(GOLDENS / "tiny_bpe" / "tokenizer.json", tmp_path)
    for text in ("[", "[]", '{"added_tokens_decoder": {"x": {"content": "y"}}}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
            tokenizer_files.from_directory(tmp_path)


def test_text_that_is_no_unicode(smollm2):
    with pytest.raises(InvalidRequestError, match="character 2 is a lone surrogate"):
        smollm2.encode("ab\ud800")
    with pytest.raises(InvalidRequestError, match="must be a string"):
        smollm2.encode(7)
    assert smollm2.decode([10**9, -5 % 2**31]) == "", "ids outside the vocabulary have no text"
