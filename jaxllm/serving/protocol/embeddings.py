"""POST /v1/embeddings."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from jaxllm.serving.protocol.base import Refusal, Strict
from jaxllm.serving.protocol.completions import PROMPT_SCHEMA, prompts


class EmbeddingRequest(Strict):
    """A request for embeddings; `input` is validated into a list of prompts."""

    model: str | None = None
    input: Annotated[Any, BeforeValidator(prompts), WithJsonSchema(PROMPT_SCHEMA)]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    # vLLM's
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None

    REFUSED: ClassVar = {
        "dimensions": Refusal("embeddings have as many dimensions as the model's hidden rows, and cannot be cut"),
        "messages": Refusal("give input; /v1/embeddings takes no conversation"),
    }
