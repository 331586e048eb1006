"""What requests that generate share: the fields of sampling."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from jaxllm.serving.protocol.base import Refusal, Strict
from jaxllm.serving.protocol.structure import ResponseFormat, StructuredOutputs


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise PydanticCustomError("stop", "must be a non-empty string or a list of them")
    return texts


def _biases(value: Any) -> Any:
    """{"123": 1.5} as JSON writes it, to {123: 1.5}."""
    if value is None:
        return None
    try:
        if any(len(token) > 20 for token in value):  # more digits than any id has: int() would take its time
            raise ValueError
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, TypeError, ValueError):
        raise PydanticCustomError("logit_bias", "must be an object from token ids to biases") from None


_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
Stop = Annotated[Any, BeforeValidator(_stop), WithJsonSchema(_TEXTS)]
_BIAS_SCHEMA = {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
LogitBias = Annotated[Any, BeforeValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class StreamOptions(Strict):
    """`stream_options`; continuous_usage_stats is vLLM's: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    REFUSED: ClassVar = {
        "include_obfuscation": Refusal("chunks are not padded", False),
    }


class Generating(Strict):
    """What every request that generates may say. Not given means: as the model's generation_config says, as in vLLM."""

    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Stop = None
    seed: Seed | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class Sampling(Generating):
    """What completions and chats have in common beside that."""

    n: Count | None = None
    max_tokens: Count | None = None
    logit_bias: LogitBias = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    # vLLM's
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    REFUSED: ClassVar = {
        **{
            f"guided_{name}": Refusal(f"vLLM 0.12 has removed it; use structured_outputs={{{name!r}: ...}}")
            for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")
        },
        "guided_decoding_backend": Refusal("there is one backend"),
        "use_beam_search": Refusal("beam search is offline only: LLM.beam_search", False),
        "length_penalty": Refusal("belongs to beam search", 1.0, 1),
        "logits_processors": Refusal("no code of requests is run"),
        "kv_transfer_params": Refusal("there is no transfer of caches"),
    }
