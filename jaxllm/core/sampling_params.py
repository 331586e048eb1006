"""What a request may ask of the sampler, under vLLM's names."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError

MAX_LOGIT_BIAS = 100.0
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 16
MAX_STOP_STRINGS = 64
MAX_N = 1024


def _finite(value: object) -> bool:
    return _integer(value) or (isinstance(value, float) and math.isfinite(value))


def _integer(value: object) -> bool:
    """An integer that messages can carry."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when they end.

    Attributes:
      n: independent samples of the same prompt; they share its pages.
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_p: sample from the smallest set of tokens whose probability reaches it. 1 disables.
      top_k: sample from the k most likely tokens. 0 or -1 disables.
      min_p: drop tokens less likely than min_p times the most likely one. 0 disables.
      presence_penalty: subtracted from the logits of tokens in the output so far; in [-2, 2].
      frequency_penalty: subtracted once for each time a token stands in the output so far; in [-2, 2].
      repetition_penalty: divides positive logits (multiplies negative ones) of tokens in prompt or output; above 0.
      seed: any 64-bit integer; the same seed gives the same tokens whatever else runs. None draws one.
      logit_bias: added to the logits of these token ids, each in [-100, 100].
      allowed_token_ids: no other token may be chosen.
      bad_words: strings that may not be completed; at most 128 token sequences of at most 16 tokens.
      min_tokens: no end-of-sequence and no stop token before this many output tokens.
      max_tokens: the most output tokens; None means as many as fit in max_model_len.
      logprobs: how many of the most likely tokens to report beside the chosen one; -1 means the whole vocabulary.
      prompt_logprobs: the same for each prompt token; -1 means the whole vocabulary.
      stop: strings that end the output, which is cut before them.
      stop_token_ids: tokens that end the output.
      include_stop_str_in_output: keep the stop string (or stop token's text) in the output.
      ignore_eos: go on past the end-of-sequence token.
      skip_special_tokens: leave special tokens out of the text.
      spaces_between_special_tokens: put spaces between special tokens in the text when they are kept.
      detokenize: whether to make text at all; stop strings need it.
      structured_outputs: the form that the output must have. Applied before all else: log-probabilities, too, are
        those of the tokens that it allows.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.top_k == -1:
            self.top_k = 0
        self._check()

    def _check(self) -> None:
        def need(holds: bool, field: str, limit: str) -> None:
            if not holds:
                raise InvalidRequestError(field, getattr(self, field), limit)

        for field, value in self.__dict__.items():
            if field in _RULES and value is not _DEFAULTS[field]:  # most are not given
                need(_RULES[field][0](value), field, _RULES[field][1])
        if self.max_tokens is not None:
            need(self.min_tokens <= self.max_tokens, "min_tokens", f"must not exceed max_tokens={self.max_tokens}")
        if self.logit_bias is not None:
            for token, bias in self.logit_bias.items():
                if not _integer(token) or not _finite(bias) or abs(bias) > MAX_LOGIT_BIAS:
                    limit = f"token ids must be integers and biases in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]"
                    raise InvalidRequestError("logit_bias", {token: bias}, limit)
        for field in ("allowed_token_ids", "stop_token_ids"):
            value = getattr(self, field)
            listed = value is None or (_listed(value) and all(_integer(token) for token in value))
            need(listed, field, "must be a list of integers")
        need(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "must allow at least one token",
        )
        if self.stop is not None:
            listed = _listed(self.stop) and all(isinstance(s, str) and s for s in self.stop)
            need(listed, "stop", "must be non-empty strings")
            need(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
            need(not self.stop or self.detokenize, "stop", "needs detokenize=True")
        if self.bad_words is not None:
            listed = _listed(self.bad_words) and all(isinstance(s, str) and s for s in self.bad_words)
            need(listed, "bad_words", "must be a list of non-empty strings")
        need(
            self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams),
            "structured_outputs",
            "must be a StructuredOutputsParams",
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequestError for token ids outside [0, vocab_size)."""
        for field in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(self, field) or ():
                if not 0 <= token < vocab_size:
                    raise InvalidRequestError(field, token, f"token ids must be in [0, {vocab_size})")


_PENALTY = (lambda value: _finite(value) and -2 <= value <= 2, "must be in [-2, 2]")
_COUNT = (lambda value: value is None or (_integer(value) and value >= -1), "must be at least 0, or -1 for all")
# What each field's value must be, where it is not the default.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "n": (lambda value: _integer(value) and 1 <= value <= MAX_N, f"must be an integer in [1, {MAX_N}]"),
    "temperature": (lambda value: _finite(value) and value >= 0, "must be finite and at least 0"),
    "top_p": (lambda value: _finite(value) and 0 < value <= 1, "must be in (0, 1]"),
    "top_k": (lambda value: _integer(value) and value >= 0, "must be in [0, 2**64), or -1 to disable"),
    "min_p": (lambda value: _finite(value) and 0 <= value <= 1, "must be in [0, 1]"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (lambda value: _finite(value) and value > 0, "must be finite and above 0"),
    "seed": (lambda value: value is None or _integer(value), "must be a 64-bit integer"),
    "min_tokens": (lambda value: _integer(value) and value >= 0, "must be an integer of at least 0"),
    "max_tokens": (lambda value: value is None or (_integer(value) and value >= 1), "must be an integer of at least 1"),
    "logprobs": _COUNT,
    "prompt_logprobs": _COUNT,
    "logit_bias": (lambda value: value is None or isinstance(value, dict), "must be a dict from token ids to biases"),
}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
