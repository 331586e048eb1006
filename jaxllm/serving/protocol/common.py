"""What requests share: strict models, fields refused by name, and the fields of sampling."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError


class Refusal:
    """Why a field that clients know is not honoured, and the values that ask for nothing and pass; null always does."""

    def __init__(self, why: str, *neutral: Any):
        self.why, self.neutral = why, neutral


class Strict(BaseModel):
    """A JSON object whose fields have JSON's own types; a field that is not declared is refused by name.

    REFUSED: fields that are known but not honoured.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    REFUSED: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = [(owner, name) for owner in cls.__mro__ for name in getattr(owner, "__dict__", {}).get("REFUSED", ())]
        left = dict(data)
        for owner, name in known:
            if name in left:
                value, entry = left.pop(name), owner.__dict__["REFUSED"][name]
                if value is not None and not any(type(value) is type(item) and value == item for item in entry.neutral):
                    raise PydanticCustomError("unsupported", "{why}", {"why": entry.why, "field": name, "value": value})
        return left


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
        return {int(token): bias for token, bias in value.items() if len(token) < 20}
    except (AttributeError, TypeError, ValueError):
        raise PydanticCustomError("logit_bias", "must be an object from token ids to biases") from None


_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
Stop = Annotated[Any, BeforeValidator(_stop), WithJsonSchema(_TEXTS)]
_BIAS_SCHEMA = {"anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}]}
LogitBias = Annotated[Any, BeforeValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]

NO_GRAMMAR = "structured outputs are not supported by this engine"


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
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class Sampling(Generating):
    """What completions and chats have in common beside that."""

    n: Count | None = None
    max_tokens: Count | None = None
    logit_bias: LogitBias = None
    stream_options: StreamOptions | None = None

    # vLLM's
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    REFUSED: ClassVar = {
        "response_format": Refusal(NO_GRAMMAR, {"type": "text"}),
        "structured_outputs": Refusal(NO_GRAMMAR),
        "guided_json": Refusal(NO_GRAMMAR),
        "guided_regex": Refusal(NO_GRAMMAR),
        "guided_choice": Refusal(NO_GRAMMAR),
        "guided_grammar": Refusal(NO_GRAMMAR),
        "use_beam_search": Refusal("beam search is offline only: LLM.beam_search", False),
        "length_penalty": Refusal("belongs to beam search", 1.0, 1),
        "logits_processors": Refusal("no code of requests is run"),
        "kv_transfer_params": Refusal("there is no transfer of caches"),
    }


def text_of(value: Any) -> str:
    """A string that can be encoded; pydantic's own check lets half surrogate pairs pass in some places."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "must be valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(text_of)]
