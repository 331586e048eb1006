"""From a request's fields to SamplingParams and checked prompts."""

import asyncio
from typing import Any

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.errors import InvalidRequestError
from jaxllm.frontend.inputs import too_long
from jaxllm.serving.errors import refuse
from jaxllm.serving.protocol.common import Sampling
from jaxllm.serving.services import Services

# Fields that mean the same in SamplingParams.
_SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "min_tokens",
    "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
    "prompt_logprobs",
)  # fmt: skip
INLINE_CHARACTERS = 2000  # up to so many are encoded and rendered at once, more on a thread


def sampling_params(services: Services, body: Sampling, **own: Any) -> SamplingParams:
    """The request's parameters over the model's defaults; `own` are those that the endpoint derives.

    Raises ApiError or InvalidRequestError naming the field and the limit.
    """
    config = services.config
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None} | own
    if given.get("n", 1) > config.max_n:
        raise refuse("n", body.n, f"at most {config.max_n} (--max-n)")
    if given.get("prompt_logprobs") is not None and body.stream:
        raise refuse("prompt_logprobs", body.prompt_logprobs, "is not available in streams")
    for field in ("logprobs", "prompt_logprobs"):
        most, asked = config.max_logprobs, given.get(field)
        if asked is not None and most >= 0 and (asked > most or asked < 0):
            name = "top_logprobs" if field == "logprobs" and hasattr(body, "top_logprobs") else field
            raise refuse(name, asked, f"at most {most} (--max-logprobs)")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options", body.stream_options.model_dump(exclude_none=True), "needs stream=true")
    return services.llm.builder.default_params(**given)


async def encode(services: Services, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of each text; of long ones or many on a thread, so that streams go on meanwhile."""
    tokenizer = services.llm.get_tokenizer()
    if len(texts) <= 4 and sum(map(len, texts)) <= INLINE_CHARACTERS:
        return tokenizer.encode_batch(texts, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode_batch, texts, add_special_tokens)


def truncate(services: Services, ids: list[int], keep: int | None, max_tokens: int | None) -> list[int]:
    """The last `keep` (truncate_prompt_tokens) of a prompt; -1: as many as leave room for max_tokens; None: all."""
    if keep is None:
        return ids
    most = services.llm.max_model_len - 1
    if keep > most:
        raise refuse("truncate_prompt_tokens", keep, f"at most {most}, max_model_len less one for the output")
    if keep == 0:
        raise InvalidRequestError("truncate_prompt_tokens", keep, "must be at least 1, or -1")
    if keep == -1:
        keep = max(1, services.llm.max_model_len - (max_tokens or 1))
    return ids[-keep:]


def check_length(services: Services, field: str, shown: object, ids: list[int]) -> None:
    """Raises InvalidRequestError for a prompt that leaves no room; `field` and `shown` are the client's own."""
    most = services.llm.max_model_len - 1
    if len(ids) > most:
        raise InvalidRequestError(field, shown, too_long(len(ids), most))
