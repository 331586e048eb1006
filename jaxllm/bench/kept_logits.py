"""The logits of an engine's steps, whole, for comparisons: no front door gives them out."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxllm.core.request import Request
from jaxllm.engine.runner import Launched, Runner
from jaxllm.llm import LLM

ROWS = 64  # whose logits are computed at a time
Logits = dict[tuple[tuple[int, ...], int], np.ndarray]  # float32[V] by prompt and the position that they predict


@contextlib.contextmanager
def kept_logits(llm: LLM) -> Iterator[Logits]:
    """Keeps the logits from which each token is sampled and, of requests that ask for logprobs of their prompts, those
    of the prompts' tokens, too. Each step is waited for. The engine core must be in this process."""
    core: Any = llm._client._core  # type: ignore[attr-defined]
    runner: Runner = core.runner
    device, kept = runner.device, {}
    shape = device._lowering.shape
    logits_of = jax.jit(lambda head, hidden: shape.logits(head, hidden)[:, : shape.vocab_size])
    sample = runner.sample

    def keep(hidden: jax.Array, owners: list[tuple[int, Request, int]]) -> None:
        for begin in range(0, len(owners), ROWS):
            part = owners[begin : begin + ROWS]
            rows = np.zeros(ROWS, np.int32)
            rows[: len(part)] = [row for row, _, _ in part]
            found = np.asarray(logits_of(device._head, hidden[rows]))
            for values, (_, request, position) in zip(found, part):
                kept[tuple(request.tokens[: request.num_prompt_tokens]), position] = values.copy()  # not all ROWS

    @functools.wraps(sample)
    def keep_sampled(launched: Launched, masks: Any = None) -> None:
        slots, owners, prompts = runner.plan.scheduler.max_num_seqs, [], []
        for rank, batch in enumerate(launched.batches):
            at = rank * launched.num_tokens
            for index, row in enumerate(batch.rows if batch else []):
                if row.samples:
                    owners.append((rank * slots + index, row.request, row.start + row.length))
                if row.request.params.prompt_logprobs is not None:
                    prompts += [(at + i, row.request, row.start + i + 1) for i in range(row.length)]
                at += row.length
        keep(device._buffers.last_hidden, owners)
        if device._all_hidden is not None:
            keep(device._all_hidden, prompts)
        sample(launched, masks)

    runner.sample = keep_sampled  # type: ignore[method-assign]
    try:
        yield kept
    finally:
        runner.sample = sample  # type: ignore[method-assign]
