"""POST /tokenize and /detokenize."""

from typing import Any

from fastapi import APIRouter

from jaxllm.serving.conversation import render
from jaxllm.serving.errors import refuse
from jaxllm.serving.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from jaxllm.serving.routes.dependencies import ServicesOf
from jaxllm.serving.sampling import encode

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, services: ServicesOf) -> dict[str, Any]:
    """A text's or a conversation's token ids."""
    services.model(body.model)
    if body.messages is not None:
        text = await render(
            services,
            body.messages,
            body.tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            variables=body.chat_template_kwargs,
        )
    else:
        text = body.prompt or ""
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    (tokens,) = await encode(services, [text], special)
    tokenizer = services.llm.get_tokenizer()
    strings = [tokenizer.id_to_token(token) for token in tokens] if body.return_token_strs else None
    return {
        "count": len(tokens),
        "max_model_len": services.llm.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, services: ServicesOf) -> dict[str, Any]:
    """Token ids' text."""
    services.model(body.model)
    tokenizer = services.llm.get_tokenizer()
    for token in body.tokens:
        if token >= services.llm.builder.limits.vocab_size:
            raise refuse("tokens", token, f"token ids must be in [0, {services.llm.builder.limits.vocab_size})")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}
