"""Prompts and parameters to checked requests: everything that can be refused is refused here, before any work."""

import dataclasses
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.messages import AddRequest
from jaxllm.errors import InvalidRequestError
from jaxllm.text.tokenizer import Tokenizer


class TokensPrompt(TypedDict):
    """A prompt of token ids."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt of text."""

    prompt: str


Prompt = str | Sequence[int] | TokensPrompt | TextPrompt


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against: vocab_size in tokens, max_model_len in prompt and output tokens."""

    vocab_size: int
    max_model_len: int


@dataclasses.dataclass(slots=True)
class PreparedRequest:
    """A checked request and its n sequences, the first of which leads the others."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[AddRequest]
    eos_token_ids: frozenset[int]


class RequestBuilder:
    """Builds requests for one model.

    Args:
      tokenizer: None for models without one: then prompts are token ids and no text comes out.
      limits: the engine's.
      config, generation_config: contents of the model's files, for end-of-sequence tokens and default parameters.
      seed: of the generator that draws seeds for requests that bring none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        seed: int,
    ):
        self.tokenizer, self.limits = tokenizer, limits
        self._generation_config = generation_config
        self._random = random.Random(seed)
        ids: set[int] = set()
        for value in (config.get("eos_token_id"), generation_config.get("eos_token_id")):
            ids.update([value] if isinstance(value, int) else value or [])
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
        self.eos_token_ids = frozenset(ids)
        self._num_requests = 0

    def default_params(self) -> SamplingParams:
        """SamplingParams with the model's generation_config as defaults, as in vLLM."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: self._generation_config[name] for name in names if self._generation_config.get(name) is not None}
        if self._generation_config.get("max_new_tokens"):
            found["max_tokens"] = self._generation_config["max_new_tokens"]
        return SamplingParams(**found)

    def token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it is one, and its checked token ids. Raises InvalidRequestError."""
        text: str | None = None
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                prompt = prompt["prompt_token_ids"]
            elif "prompt" in prompt:
                prompt = prompt["prompt"]
            else:
                raise InvalidRequestError("prompt", list(prompt), "needs 'prompt' or 'prompt_token_ids'")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("prompt", prompt, "this model has no tokenizer: give prompt_token_ids")
            text, ids = prompt, self.tokenizer.encode(prompt)
        elif isinstance(prompt, Sequence) or hasattr(prompt, "tolist"):
            ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
        else:
            raise InvalidRequestError("prompt", prompt, "must be text or token ids")
        if not ids:
            raise InvalidRequestError("prompt", prompt, "must hold at least one token")
        if len(ids) >= self.limits.max_model_len:
            limit = f"{len(ids)} tokens; max_model_len={self.limits.max_model_len} leaves room for one output token at most"
            raise InvalidRequestError("prompt", text if text is not None else ids, limit)
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.limits.vocab_size:
                limit = f"token ids must be integers in [0, {self.limits.vocab_size})"
                raise InvalidRequestError("prompt_token_ids", token, limit)
        return text, ids

    def build(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
    ) -> PreparedRequest:
        """A checked request.

        Args:
          prompt: text or token ids.
          params: None means `default_params`.
          request_id: unique among live requests; drawn if None.
          priority: lower runs first under the priority policy.
          cache_salt: requests of different salts share no cached prefix.
          output_token_ids: tokens already emitted (with n = 1): generation continues exactly after them, given the
            same seed.

        Raises:
          InvalidRequestError: naming the field, its value and the limit.
        """
        from jaxllm.engine.sampling import bad_word_sequences, derive_seed

        params = self.default_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("sampling_params", params, "must be a SamplingParams")
        text, ids = self.token_ids(prompt)
        params.check_vocabulary(self.limits.vocab_size)
        emitted = list(output_token_ids)
        if emitted:
            if params.n != 1:
                raise InvalidRequestError("n", params.n, "a request with output_token_ids has one sample")
            self.token_ids(emitted)
        room = self.limits.max_model_len - len(ids)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if len(emitted) >= min(max_tokens, room):
            raise InvalidRequestError("output_token_ids", len(emitted), f"must be fewer than {min(max_tokens, room)}")
        words: list[list[int]] = []
        if params.bad_words:
            tokenizer = self.tokenizer
            if tokenizer is None:
                raise InvalidRequestError("bad_words", params.bad_words, "this model has no tokenizer")
            words = bad_word_sequences(params.bad_words, lambda word: tokenizer.encode(word, add_special_tokens=False))
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop", params.stop, "this model has no tokenizer")
        stops = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= self.eos_token_ids
        self._num_requests += 1
        request_id = request_id or f"request-{self._num_requests}"
        seed = self._random.getrandbits(64) if params.seed is None else params.seed % 2**64
        single = params if params.n == 1 else dataclasses.replace(params, n=1)
        arrival = time.monotonic()
        sequences = [
            AddRequest(
                id=request_id if params.n == 1 else f"{request_id}/{index}",
                prompt_token_ids=ids,
                output_token_ids=emitted,
                params=single,
                max_tokens=max_tokens,
                stop_token_ids=sorted(stops),
                seed=derive_seed(seed, index),
                arrival=arrival,
                bad_words=words,
                priority=priority,
                cache_salt=cache_salt,
                leader=f"{request_id}/0" if index else None,
            )
            for index in range(params.n)
        ]
        if params.prompt_logprobs is not None:  # once is enough
            for sequence in sequences[1:]:
                sequence.params = dataclasses.replace(single, prompt_logprobs=None)
        return PreparedRequest(request_id, text, ids, params, sequences, self.eos_token_ids)
