"""The bytes that each token stands for, where a tokenizer's decoder works token by token.

With them a stream is decoded by appending bytes to a UTF-8 decoder: exact, and constant time a token.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: character -> byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class TokenBytes:
    """A table from token id to bytes, filled as tokens are seen.

    Attributes:
      strip_start: how many leading spaces the decoder drops at the very start of a text.
    """

    def __init__(self, backend: Backend, *, byte_level: bool, space: str = "", strip_start: int = 0):
        self._backend = backend
        self._alphabet = byte_alphabet() if byte_level else None
        self._space = space
        self.strip_start = strip_start
        self._table: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The token's bytes; none for an id outside the vocabulary, as the decoder skips those."""
        found = self._table.get(token)
        if found is None:
            found = self._table[token] = self._spell(self._backend.id_to_token(token))
        return found

    def _spell(self, text: str | None) -> bytes:
        if text is None:
            return b""
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[character] for character in text])
            except KeyError:  # an added token, written as it reads
                return text.encode()
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace(self._space, " ").encode()


def token_bytes(backend: Backend) -> TokenBytes | None:
    """The table for this tokenizer, or None if its decoder needs more than one token at a time."""
    if backend.decoder is None:
        return None
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    if state["type"] == "ByteLevel":
        return TokenBytes(backend, byte_level=True)
    if state["type"] != "Sequence":
        return None
    # SentencePiece's: Replace("▁", " "), ByteFallback, Fuse and, where a space was put before the text, Strip
    steps = [step["type"] for step in state["decoders"]]
    if steps not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return None
    replace, strip = state["decoders"][0], state["decoders"][3:]
    if replace["content"] != " " or not replace["pattern"].get("String"):
        return None
    if strip and (strip[0]["content"] != " " or strip[0]["stop"]):
        return None
    start = strip[0]["start"] if strip else 0
    return TokenBytes(backend, byte_level=False, space=replace["pattern"]["String"], strip_start=start)
