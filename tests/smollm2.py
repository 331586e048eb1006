"""The default model with sizes that every test of it shares, so that each of its programs is compiled once a run."""

from typing import Any

SIZES: dict[str, Any] = dict(
    max_model_len=512,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    token_rungs=(8, 64),
    page_size=16,
    kv_cache_memory_bytes=60_000_000,
)
# What a notebook, which says only LLM("smollm2"), is given before it: two step sizes instead of nine, two samplers'
# instead of three.
PRELUDE = f"import functools, jaxllm; jaxllm.LLM = functools.partial(jaxllm.LLM, **{SIZES!r})\n"
