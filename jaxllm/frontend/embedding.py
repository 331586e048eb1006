"""From a finished pooling request to its embedding."""

import numpy as np

from jaxllm.core.pooling_params import PoolingParams
from jaxllm.errors import JaxllmError
from jaxllm.frontend.collector import RequestCollector
from jaxllm.frontend.outputs import EmbeddingOutput, EmbeddingRequestOutput


def embedding_output(collector: RequestCollector, params: PoolingParams) -> EmbeddingRequestOutput:
    """Raises JaxllmError if the request ended without one: aborted, or given up by the engine."""
    output = collector.output
    (sample,) = output.outputs
    if collector.embedding is None or sample.finish_reason not in ("length", "stop"):
        raise JaxllmError(f"{output.request_id}: no embedding: {sample.error or sample.finish_reason}")
    row = collector.embedding
    if params.normalize:
        row = row / max(float(np.linalg.norm(row)), 1e-12)
    return EmbeddingRequestOutput(
        output.request_id,
        EmbeddingOutput(row.tolist()),
        output.prompt_token_ids,
        num_cached_tokens=output.num_cached_tokens,
        queue_time=output.queue_time,
    )
