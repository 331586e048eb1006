"""What a request may ask of the sampler, under vLLM's names."""

import dataclasses
import math
from collections.abc import Sequence

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

        need(_integer(self.n) and 1 <= self.n <= MAX_N, "n", f"must be an integer in [1, {MAX_N}]")
        need(_finite(self.temperature) and self.temperature >= 0, "temperature", "must be finite and at least 0")
        need(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        need(_integer(self.top_k) and self.top_k >= 0, "top_k", "must be in [0, 2**64), or -1 to disable")
        need(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", "must be in [0, 1]")
        for field in ("presence_penalty", "frequency_penalty"):
            need(_finite(getattr(self, field)) and -2 <= getattr(self, field) <= 2, field, "must be in [-2, 2]")
        need(
            _finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "must be finite and above 0",
        )
        need(
            self.seed is None or (_integer(self.seed) and -(2**63) <= self.seed < 2**64),
            "seed",
            "must be a 64-bit integer",
        )
        need(_integer(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "must be an integer of at least 0")
        if self.max_tokens is not None:
            need(_integer(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "must be an integer of at least 1")
            need(self.min_tokens <= self.max_tokens, "min_tokens", f"must not exceed max_tokens={self.max_tokens}")
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            need(value is None or (_integer(value) and value >= -1), field, "must be at least 0, or -1 for all")
        if self.logit_bias is not None:
            need(isinstance(self.logit_bias, dict), "logit_bias", "must be a dict from token ids to biases")
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
