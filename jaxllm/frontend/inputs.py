"""Prompts and parameters to checked requests: everything that can be refused is refused here, before any work."""

import copy
import dataclasses
import importlib.util
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from jaxllm.core.pooling_params import PoolingParams
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.seeds import derive_seed
from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.engine.messages import AddRequest
from jaxllm.errors import InvalidRequestError
from jaxllm.text.bad_words import bad_word_sequences
from jaxllm.text.eos import eos_token_ids
from jaxllm.text.output import OutputText
from jaxllm.text.tokenizer import Tokenizer


class TokensPrompt(TypedDict):
    """A prompt of token ids."""

    prompt_token_ids: list[int]


class TextPrompt(TypedDict):
    """A prompt of text."""

    prompt: str


Prompt = str | Sequence[int] | TokensPrompt | TextPrompt

_ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, detokenize=False)  # the sampler's part of an embedding


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """What requests are checked against: vocab_size in tokens, max_model_len in prompt and output tokens, and the
    policy that orders them."""

    vocab_size: int
    max_model_len: int
    scheduling_policy: str = "fcfs"


@dataclasses.dataclass(slots=True)
class PreparedRequest:
    """A checked request and its n sequences, the first of which leads the others."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[AddRequest]
    eos_token_ids: frozenset[int]


def too_long(length: int, most: int) -> str:
    """The limit that a prompt of so many tokens passes; clients know a context that is too small by these words."""
    total = f"this model's maximum context length is {most + 1} tokens (max_model_len), one of them for the output"
    return f"has {length} tokens; at most {most}: {total}"


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
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        self._defaults = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
        if generation_config.get("max_new_tokens"):
            self._defaults["max_tokens"] = generation_config["max_new_tokens"]
        self._random = random.Random(seed)
        self.eos_token_ids = eos_token_ids(config, generation_config, tokenizer)
        self._num_requests = 0

    def default_params(self, **given: Any) -> SamplingParams:
        """SamplingParams of what is given, with the model's generation_config as defaults, as in vLLM."""
        return SamplingParams(**(self._defaults | given))

    def token_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it is one, and its checked token ids. Raises InvalidRequestError."""
        text: str | None = None
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                prompt = prompt["prompt_token_ids"]  # type: ignore[typeddict-item]
            elif "prompt" in prompt:
                prompt = prompt["prompt"]
            else:
                raise InvalidRequestError("prompt", list(prompt), "needs 'prompt' or 'prompt_token_ids'")
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequestError("prompt", prompt, "this model has no tokenizer: give prompt_token_ids")
            text, ids = prompt, self.tokenizer.encode(prompt)
            if ids and max(ids) >= self.limits.vocab_size:
                limit = f"its token {max(ids)} is not in the model's vocabulary of {self.limits.vocab_size}"
                raise InvalidRequestError("prompt", prompt, limit)
        else:
            ids = self._checked_ids("prompt_token_ids", prompt)
        if not ids:
            raise InvalidRequestError("prompt", prompt, "must hold at least one token")
        most = self.limits.max_model_len - 1
        if len(ids) > most:
            raise InvalidRequestError("prompt", text if text is not None else ids, too_long(len(ids), most))
        return text, ids

    def _checked_ids(self, field: str, ids: Any) -> list[int]:
        """A list of the token ids in a sequence or an array. Raises InvalidRequestError."""
        listed = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes, bytearray)):
            raise InvalidRequestError(field, ids, "must be text or a sequence of token ids")
        if listed and set(map(type, listed)) == {int} and min(listed) >= 0 and max(listed) < self.limits.vocab_size:
            return list(listed)  # the usual case, made fast
        for token in listed:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.limits.vocab_size:
                limit = f"token ids must be integers in [0, {self.limits.vocab_size})"
                raise InvalidRequestError(field, token, limit)
        return list(listed)

    def build(
        self,
        prompt: Prompt,
        params: SamplingParams | PoolingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
    ) -> PreparedRequest:
        """A checked request.

        Args:
          prompt: text or token ids.
          params: None means `default_params`; PoolingParams ask for an embedding.
          request_id: unique among live requests; drawn if None.
          priority: lower runs first under the priority policy; 0 under any other.
          cache_salt: requests of different salts share no cached prefix.
          output_token_ids: tokens already emitted (with n = 1): generation continues exactly after them, given the
            same seed.

        Raises:
          InvalidRequestError: naming the field, its value and the limit.
        """
        pooling = isinstance(params, PoolingParams)
        params = self._checked_params(_ONE_TOKEN if isinstance(params, PoolingParams) else params)
        _check_envelope(request_id, priority, cache_salt)
        if priority != 0 and self.limits.scheduling_policy != "priority":
            limit = f"must be 0 under scheduling_policy={self.limits.scheduling_policy!r}; 'priority' orders by it"
            raise InvalidRequestError("priority", priority, limit)
        text, ids = self.token_ids(prompt)
        room = self.limits.max_model_len - len(ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > room:
            limit = f"at most {room}: the prompt has {len(ids)} tokens, and max_model_len={self.limits.max_model_len}"
            raise InvalidRequestError("min_tokens", params.min_tokens, limit)
        stops = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= self.eos_token_ids
        if params.min_tokens and params.allowed_token_ids is not None and stops.issuperset(params.allowed_token_ids):
            limit = f"all of them end the request, and min_tokens={params.min_tokens} forbids that"
            raise InvalidRequestError("allowed_token_ids", params.allowed_token_ids, limit)
        emitted = self._checked_ids("output_token_ids", output_token_ids)
        if emitted:
            self._check_emitted(ids, emitted, params, stops, max_tokens)
        words: list[list[int]] = []
        if params.bad_words:
            tokenizer = self.tokenizer
            if tokenizer is None:
                raise InvalidRequestError("bad_words", params.bad_words, "this model has no tokenizer")
            words = bad_word_sequences(params.bad_words, lambda word: tokenizer.encode(word, add_special_tokens=False))
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError("stop", params.stop, "this model has no tokenizer")
        self._num_requests += 1
        request_id = request_id or f"request-{self._num_requests}"
        seed = self._random.getrandbits(64) if params.seed is None else params.seed % 2**64
        single = params if params.n == 1 else dataclasses.replace(params, n=1)
        arrival = time.monotonic()
        # Numbered, so that what is still under way for an ended request never meets a new one of the same id.
        name = f"{request_id}#{self._num_requests}"
        sequences = [
            AddRequest(
                id=name if params.n == 1 else f"{name}/{index}",
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
                leader=f"{name}/0" if index else None,
                pooling=pooling,
            )
            for index in range(params.n)
        ]
        if params.prompt_logprobs is not None:  # once is enough
            for sequence in sequences[1:]:
                sequence.params = dataclasses.replace(single, prompt_logprobs=None)
        return PreparedRequest(request_id, text, ids, params, sequences, self.eos_token_ids)

    def _checked_params(self, params: SamplingParams | None) -> SamplingParams:
        """A copy, checked once more: the caller may have changed fields since, and may change them later."""
        if params is None:
            return self.default_params()
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("sampling_params", params, "must be a SamplingParams")
        params = copy.copy(params)
        params.__post_init__()
        for field in ("allowed_token_ids", "stop_token_ids", "stop", "bad_words"):
            if getattr(params, field) is not None:
                setattr(params, field, list(getattr(params, field)))
        for field in ("stop", "bad_words"):
            for text in getattr(params, field) or ():
                _check_unicode(field, text)
        params.check_vocabulary(self.limits.vocab_size)
        if params.structured_outputs is not None:
            params.structured_outputs = self._checked_structure(params.structured_outputs)
        return params

    def _checked_structure(self, asked: StructuredOutputsParams) -> StructuredOutputsParams:
        """A copy that messages can carry. Whether its grammar is one turns out where it is compiled, in the core."""

        def refuse(limit: str) -> InvalidRequestError:
            return InvalidRequestError("structured_outputs", asked, limit)

        if self.tokenizer is None:
            raise refuse("this model has no tokenizer")
        if self.tokenizer.bytes_of is None:
            raise refuse("needs a tokenizer whose decoder works token by token; this model's does not")
        if not any(token < self.limits.vocab_size for token in self.eos_token_ids):
            raise refuse("this model has no end-of-sequence token, so that no output could end")
        if importlib.util.find_spec("llguidance") is None:
            raise refuse("needs the package llguidance, which the extra 'serve' brings: pip install 'jaxllm[serve]'")
        return asked.checked()

    def _check_emitted(
        self, ids: list[int], emitted: list[int], params: SamplingParams, stops: set[int], max_tokens: int
    ) -> None:
        """Raises InvalidRequestError unless a request with this output can go on."""
        if params.n != 1:
            raise InvalidRequestError("n", params.n, "a request with output_token_ids has one sample")
        if len(emitted) >= max_tokens:
            limit = f"holds {len(emitted)} tokens, must hold fewer than max_tokens={max_tokens}"
            raise InvalidRequestError("output_token_ids", emitted, limit)
        ended = next((token for token in emitted if token in stops), None)
        if ended is not None:
            raise InvalidRequestError("output_token_ids", ended, "is a stop token: this output has ended")
        if params.stop and self.tokenizer is not None:
            text = OutputText(
                self.tokenizer,
                ids,
                emitted,
                stop=params.stop,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            if text.stop_string is not None:
                limit = f"holds the stop string {text.stop_string!r}: this output has ended"
                raise InvalidRequestError("output_token_ids", emitted, limit)


def _check_envelope(request_id: object, priority: object, cache_salt: object) -> None:
    """Raises InvalidRequestError for what the scheduler cannot order or name a request by."""
    if request_id is not None and (not isinstance(request_id, str) or not request_id):
        raise InvalidRequestError("request_id", request_id, "must be a non-empty string")
    if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**63) <= priority < 2**63:
        raise InvalidRequestError("priority", priority, "must be a 64-bit integer")
    if not isinstance(cache_salt, str):
        raise InvalidRequestError("cache_salt", cache_salt, "must be a string")
    _check_unicode("request_id", request_id or "")
    _check_unicode("cache_salt", cache_salt)


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        limit = f"must be valid Unicode; character {error.start} is a lone surrogate"
        raise InvalidRequestError(field, text, limit) from None
