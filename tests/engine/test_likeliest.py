"""Greedy tokens from a kernel that writes no logits, in the place of which the reference stands here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import SamplingParams
from jaxllm.engine.sampling import GREEDY, sample_likeliest
from jaxllm.models import decoder
from pallas_kernels.argmax_projection import reference
from tests.engine import tiny
from tests.engine.sampling.harness import run
from tests.engine.sampling.test_independence import VOCAB, rows_using

AXIS = "shards"
PROMPTS = [[3 + (7 * at + 11 * row) % 250 for at in range(3 + row)] for row in range(9)]


def _rows():
    """With ties, within shards and between them, and such that have no token."""
    rows = rows_using((), 9, seed=5)
    for row in rows:
        row.params.temperature = 0
    rows[0].logits[[3000, VOCAB - 1]] = 50
    rows[1].logits[[10, 11, 2999]] = 50
    rows[2].logits[5] = np.nan
    rows[3].logits[VOCAB - 1] = np.inf
    rows[4].logits[:] = -np.inf
    rows[5].logits[0] = -np.inf
    return rows


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_as_the_sampler_finds_them(shards):
    rows = _rows()
    expected = run(rows, GREEDY)
    width = -(-VOCAB // shards)
    logits = np.full((len(rows), shards * width), np.nan, np.float32)  # the padding
    logits[:, :VOCAB] = [row.logits for row in rows]

    def one(logits):
        start = jax.lax.axis_index(AXIS) * width
        num_valid = jnp.clip(VOCAB - start, 0, width)
        # The identity as a weight would make NaN of every entry of a row that has one, so its columns are cut here.
        entries = jnp.where(logits < jnp.inf, logits, jnp.inf)
        entries = jnp.where(jnp.arange(width) < num_valid, entries, -jnp.inf)
        ids = jnp.argmax(entries, axis=1).astype(jnp.int32) + start
        return sample_likeliest(jnp.max(entries, axis=1), ids, AXIS)

    parts = logits.reshape(len(rows), shards, width).swapaxes(0, 1)
    found = jax.vmap(one, axis_name=AXIS)(parts)
    for shard in range(shards):
        for name in ("tokens", "num_accepted", "logprob", "rank", "top_ids", "top_logprobs", "finite"):
            np.testing.assert_array_equal(getattr(found, name)[shard], getattr(expected, name), err_msg=name)
    assert not np.asarray(expected.finite)[2:5].any() and np.asarray(expected.finite)[[0, 1, 5, 6, 7, 8]].all()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_an_engine_generates_the_same(checkpoint, monkeypatch, kind):
    """With an output projection and with tied embeddings under a soft cap; beside it rows that are not greedy."""
    params = [SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True) for _ in PROMPTS]
    mixed = [SamplingParams(max_tokens=6, temperature=float(at % 2), seed=at, ignore_eos=True) for at in range(9)]

    def outputs():
        with tiny.llm(checkpoint(kind)) as llm:
            return [
                [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS, sampling, use_tqdm=False)]
                for sampling in (params, mixed)
            ]

    expected, calls = outputs(), []

    def instead(x, weight, num_valid, *, by_columns, cap, backend):
        calls.append(by_columns)
        return reference.argmax_projection(x, weight, num_valid, by_columns=by_columns, cap=cap)

    monkeypatch.setattr(decoder.argmax, "has_kernel", lambda x, weight, backend, *, by_columns: True)
    monkeypatch.setattr(decoder.argmax, "argmax_projection", instead)
    assert outputs() == expected
    assert calls and set(calls) == {kind == "gemma2"}
