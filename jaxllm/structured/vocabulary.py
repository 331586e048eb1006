"""A model's vocabulary as llguidance needs it."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance

    from jaxllm.text.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class Vocabulary:
    """What each token stands for.

    Attributes:
      tokens: each token's bytes, by id, as many as the model has logits; none for ids that the tokenizer lacks.
      special: ids of special tokens: no text matches them, a grammar may name them.
      eos: ids of the tokens that end an output; at least one.
    """

    tokens: list[bytes]
    special: list[int]
    eos: list[int]


def vocabulary_of(tokenizer: "Tokenizer", vocab_size: int, eos: frozenset[int]) -> Vocabulary:
    """The vocabulary of a tokenizer whose tokens have bytes (`Tokenizer.bytes_of`) and a model of `vocab_size`."""
    table = tokenizer.bytes_of
    assert table is not None, "the tokenizer's decoder does not work token by token"
    known = min(vocab_size, tokenizer.vocab_size)
    tokens = [table[token] for token in range(known)] + [b""] * (vocab_size - known)
    special = sorted({token for token in tokenizer.special_ids if token < vocab_size} | eos)
    return Vocabulary(tokens, special, sorted(eos))


Encode = Callable[[str], list[int]]


class _Tokens:
    """The interface that llguidance asks of a tokenizer.

    Where a grammar leaves one continuation only, it allows the tokens that the tokenizer would choose for it, so that
    the model reads what it is used to.
    """

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None):
        self.tokens, self.special_token_ids = vocabulary.tokens, vocabulary.special
        self.eos_token_id = vocabulary.eos[0]
        self._encode, self._special = encode, frozenset(vocabulary.special)
        plain = [(token, i) for i, token in enumerate(vocabulary.tokens) if token and i not in self._special]
        self._ids = {token: i for token, i in reversed(plain)}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes | str) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        if self._encode is not None:
            # Some tokenizers put a space before a text; they put it before the mark instead.
            for mark in ("", "\x02"):
                ids = self._encode(mark + data.decode("utf-8", "replace"))
                while mark and ids and not self._spells(ids, data):
                    ids = ids[1:]
                if self._spells(ids, data):
                    return ids
        return self._longest_first(data)

    def _spells(self, ids: list[int], data: bytes) -> bool:
        known = all(token < len(self.tokens) and token not in self._special for token in ids)
        return known and b"".join([self.tokens[token] for token in ids]) == data

    def _longest_first(self, data: bytes) -> list[int]:
        found, at = [], 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                break  # what follows cannot be spelled
            found.append(self._ids[data[at:end]])
            at = end
        return found


def llguidance_tokenizer(vocabulary: Vocabulary, encode: Encode | None = None) -> "llguidance.LLTokenizer":
    """The library's trie of all tokens. Takes some tenths of a second for a large vocabulary.

    encode: a text's tokens without any added ones; None takes the longest tokens that fit.
    """
    import llguidance

    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Tokens(vocabulary, encode)),
        n_vocab=len(vocabulary.tokens),
        eos_token=vocabulary.eos,
    )
