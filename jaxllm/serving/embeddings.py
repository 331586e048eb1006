"""Embeddings: a request to prompts, their vectors to an answer."""

import asyncio
import base64
import time
from typing import Any

import numpy as np

from jaxllm.core.pooling_params import PoolingParams
from jaxllm.errors import EngineDeadError, InvalidRequestError, JaxllmError, QueueFullError
from jaxllm.frontend.outputs import EmbeddingRequestOutput
from jaxllm.serving.context import Context
from jaxllm.serving.errors import ApiError, refuse
from jaxllm.serving.protocol.embeddings import EmbeddingRequest
from jaxllm.serving.sampling import check_length, encode, truncate
from jaxllm.serving.services import Services

_NAMES = {"prompt": "input", "prompt_token_ids": "input"}


async def embed(services: Services, context: Context, body: EmbeddingRequest) -> dict[str, Any]:
    """The whole answer. Cancelling it aborts what is under way. Raises ApiError or any of jaxllm.errors."""
    model, most = services.model(body.model), services.config.max_prompts
    if len(body.input) > most:
        raise refuse("input", f"{len(body.input)} prompts", f"at most {most} (--max-prompts)")
    services.admission.check(len(body.input))
    if isinstance(body.input[0], str):
        encoded = await encode(services, body.input, body.add_special_tokens is not False)
    else:
        encoded = body.input
    prompts = [truncate(services, ids, body.truncate_prompt_tokens, 1) for ids in encoded]
    for text, ids in zip(body.input, prompts, strict=True):
        check_length(services, "input", text, ids)
    ticket = services.admission.enter(len(prompts), sum(map(len, prompts)))
    try:
        outputs = await _run(services, context, prompts, body)
    except InvalidRequestError as error:
        raise InvalidRequestError(_NAMES.get(error.field, error.field), error.value, error.limit) from None
    except (QueueFullError, EngineDeadError):
        raise
    except JaxllmError as error:
        raise ApiError(500, str(error), None, "generation_error") from None
    finally:
        ticket.leave()
    _tell(services, context, outputs)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(output, body.encoding_format)}
        for index, output in enumerate(outputs)
    ]
    count = sum(map(len, prompts))
    return {
        "id": f"embd-{body.request_id or context.request_id}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0},
    }


async def _run(
    services: Services, context: Context, prompts: list[list[int]], body: EmbeddingRequest
) -> list[EmbeddingRequestOutput]:
    """All prompts at once; the first that fails ends the others."""
    params, salt = PoolingParams(normalize=body.normalize is not False), context.cache_salt(body.cache_salt)
    tasks = [
        asyncio.ensure_future(
            services.llm.embed(
                {"prompt_token_ids": ids},
                params,
                request_id=f"{context.number}.{position}",
                priority=body.priority or 0,
                cache_salt=salt,
            )
        )
        for position, ids in enumerate(prompts)
    ]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tell(services: Services, context: Context, outputs: list[EmbeddingRequestOutput]) -> None:
    metrics = services.metrics
    for output in outputs:
        metrics.finished("stop")
        metrics.e2e.observe(time.perf_counter() - context.begin)
        metrics.prompt_tokens.inc(len(output.prompt_token_ids))
        metrics.prompt_length.observe(len(output.prompt_token_ids))
        if output.queue_time is not None:
            metrics.queue_time.observe(output.queue_time)
    context.log["prompt_tokens"] = sum(len(output.prompt_token_ids) for output in outputs)
    if services.tracing is not None:
        attributes = {
            "gen_ai.request.id": context.request_id,
            "gen_ai.usage.prompt_tokens": context.log["prompt_tokens"],
            "gen_ai.usage.num_sequences": len(outputs),
            "gen_ai.latency.time_in_queue": outputs[0].queue_time,
        }
        services.tracing.request(time.perf_counter() - context.begin, context.caller, attributes)
    context.log["cached_tokens"] = sum(output.num_cached_tokens for output in outputs)


def _vector(output: EmbeddingRequestOutput, form: str | None) -> list[float] | str:
    """JSON numbers, or float32 in little-endian order as base64."""
    if form == "base64":
        return base64.b64encode(np.asarray(output.outputs.embedding, "<f4").tobytes()).decode()
    return output.outputs.embedding
