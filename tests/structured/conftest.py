"""A vocabulary and a compiler that the tests of a worker share."""

import pytest

from jaxllm.structured.compiler import GrammarCompiler
from jaxllm.structured.vocabulary import Vocabulary
from tests.engine.tiny import BOS, EOS, FIRST_BYTE, UNK, VOCAB, WORDS


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """The tiny models': three special tokens, every byte, some longer tokens, some that spell nothing."""
    tokens = [b"<unk>", b"<s>", b"</s>"] + [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
    assert len(tokens) == FIRST_BYTE + 256 + len(WORDS)
    return Vocabulary(tokens + [b""] * (VOCAB - len(tokens)), [UNK, BOS, EOS], [EOS])


@pytest.fixture(scope="session")
def compiler(vocabulary):
    compiler = GrammarCompiler(lambda: (vocabulary, None))
    yield compiler
    compiler.close()
