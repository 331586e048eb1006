"""Words that may not be completed, as token sequences."""

from collections.abc import Callable, Sequence

from jaxllm.core.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from jaxllm.errors import InvalidRequestError


def check_bad_words(bad_words: Sequence[Sequence[int]]) -> None:
    """Raises InvalidRequestError for more than 128 sequences or one longer than 16 tokens."""
    if len(bad_words) > MAX_BAD_WORDS:
        raise InvalidRequestError("bad_words", len(bad_words), f"at most {MAX_BAD_WORDS} token sequences")
    for word in bad_words:
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError("bad_words", list(word), f"sequences of 1 to {MAX_BAD_WORD_TOKENS} tokens")


def bad_word_sequences(bad_words: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The token sequences of `SamplingParams.bad_words`, checked.

    As in vLLM, each word is taken with and without a space before it; the one with a space counts only if it is a
    different sequence of the same length (a tokenizer that splits the space off would forbid the space's follower).

    Args:
      bad_words: the strings.
      encode: text to token ids, without special tokens.
    """
    sequences: list[list[int]] = []
    for word in bad_words:
        plain, spaced = encode(word.lstrip()), encode(" " + word.lstrip())
        if plain:
            sequences.append(plain)
        if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
            sequences.append(spaced)
    check_bad_words(sequences)
    return sequences
