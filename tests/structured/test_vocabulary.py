"""What llguidance is told of a tokenizer."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxllm.structured.vocabulary import Vocabulary, llguidance_tokenizer, vocabulary_of
from jaxllm.text.tokenizer import Tokenizer
from tests.engine import tiny


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(directory)
    return Tokenizer(Backend.from_file(str(directory / "tokenizer.json")))


def sentencepiece() -> Tokenizer:
    """A space before every text, as Llama 2's."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "he",
        "▁the",
    ]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Backend(models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


def tokens_of(tokenizer: Tokenizer, text: str, size: int = 300) -> list[bytes]:
    vocabulary = vocabulary_of(tokenizer, size, frozenset({2}))
    made = llguidance_tokenizer(vocabulary, lambda t: tokenizer.encode(t, add_special_tokens=False))
    return [vocabulary.tokens[token] for token in made.tokenize_str(text)]


def test_a_vocabulary_is_as_wide_as_the_logits(byte_level):
    for size in (280, 300, 333):
        vocabulary = vocabulary_of(byte_level, size, frozenset({tiny.EOS}))
        assert len(vocabulary.tokens) == size == llguidance_tokenizer(vocabulary).vocab_size
        assert vocabulary.special == [0, 1, 2] and vocabulary.eos == [tiny.EOS]
    assert vocabulary.tokens[tiny.FIRST_BYTE + 65] == b"A" and vocabulary.tokens[-1] == b""
    assert vocabulary.tokens[byte_level.token_to_id("Ġa")] == b" a"


def test_forced_text_is_spelled_as_the_tokenizer_does(byte_level):
    assert tokens_of(byte_level, "there é") == [b"th", b"er", b"e", b" ", b"\xc3", b"\xa9"]
    assert tokens_of(sentencepiece(), "the the") == [b"t", b"he", b" the"]
    assert tokens_of(sentencepiece(), " the") == [b" the"]
    assert tokens_of(sentencepiece(), "é") == [b"\xc3", b"\xa9"]


def test_text_that_reads_like_a_special_token_is_text(byte_level):
    assert tokens_of(byte_level, "a</s>") == [b"a", b"<", b"/", b"s", b">"]


def test_without_an_encoder_the_longest_tokens_are_taken():
    vocabulary = Vocabulary([b"", b"a", b"ab", b"abc", b"c", b"b"], [0], [0])
    assert llguidance_tokenizer(vocabulary).tokenize_str("abcab") == [3, 2]
    assert llguidance_tokenizer(vocabulary).tokenize_str("abzc") != []
