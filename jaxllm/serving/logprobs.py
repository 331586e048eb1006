"""Log-probabilities in the forms of the two APIs and of vLLM's prompt_logprobs."""

from collections.abc import Sequence
from typing import Any

from jaxllm.frontend.outputs import Logprob
from jaxllm.text.tokenizer import Tokenizer

Position = dict[int, Logprob]  # the token itself first, then the most likely ones


class LogprobFormat:
    """How a request wants them.

    Args:
      tokenizer: for the tokens' bytes; None without one.
      most: how many alternatives to show.
      as_ids: show tokens as "token_id:17" instead of their text, which need not be unique.
    """

    def __init__(self, tokenizer: Tokenizer | None, most: int, as_ids: bool):
        self._tokenizer, self._most, self._as_ids = tokenizer, most, as_ids

    def _text(self, token: int, entry: Logprob) -> str:
        if self._as_ids or entry.decoded_token is None:
            return f"token_id:{token}"
        return entry.decoded_token

    def _bytes(self, token: int, text: str) -> list[int]:
        if self._tokenizer is not None and self._tokenizer.bytes_of is not None and not self._as_ids:
            return list(self._tokenizer.bytes_of[token])
        return list(text.encode())

    def _likely(self, position: Position) -> list[tuple[int, Logprob]]:
        """The `most` most likely tokens of a position."""
        ranked = sorted(position.items(), key=lambda item: -item[1].logprob)
        return ranked[: self._most] if self._most >= 0 else ranked

    def chat(self, token_ids: Sequence[int], positions: Sequence[Position]) -> dict[str, Any]:
        """`choices[].logprobs` of chats."""
        content = []
        for token, position in zip(token_ids, positions, strict=True):
            entry = self._entry(token, position[token])
            entry["top_logprobs"] = [self._entry(*item) for item in self._likely(position)]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        text = self._text(token, entry)
        return {"token": text, "logprob": _finite(entry.logprob), "bytes": self._bytes(token, text)}

    def completion(
        self, token_ids: Sequence[int], positions: Sequence[Position | None], offset: int = 0
    ) -> tuple[dict[str, Any], int]:
        """`choices[].logprobs` of completions, and the text offset after them. A prompt's first position has none."""
        found: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, position in zip(token_ids, positions, strict=True):
            if position is None:
                text = f"token_id:{token}" if self._as_ids or not self._tokenizer else self._tokenizer.token_text(token)
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
            else:
                text = self._text(token, position[token])
                found["token_logprobs"].append(_finite(position[token].logprob))
                top = {self._text(*item): _finite(item[1].logprob) for item in self._likely(position)}
                # the token itself belongs in, as in OpenAI's API
                found["top_logprobs"].append(top | {text: _finite(position[token].logprob)})
            found["tokens"].append(text)
            found["text_offset"].append(offset)
            offset += len(text)
        return found, offset


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 is what OpenAI and vLLM write for it."""
    return max(logprob, -9999.0)


def prompt_logprobs(positions: Sequence[Position | None]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`."""

    def entries(position: Position) -> dict[str, Any]:
        return {str(token): _entry(entry) for token, entry in position.items()}

    return [None if position is None else entries(position) for position in positions]


def _entry(entry: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
