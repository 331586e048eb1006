"""A residual stream whose rows are dealt out among the shards gives the hidden rows that one on all shards gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import loader
from jaxllm.models.decoder import CausalLM
from jaxllm.models.gemma2 import Gemma2ForCausalLM
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.metadata import LinearMetadata, StepMetadata
from pallas_kernels.ragged_paged_attention import CacheSpec, cache_shape
from sharding import RULES, TENSOR
from tests.pallas_kernels.batches import metadata, shuffled_tables

FIELDS = dict(
    vocab_size=41,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    attention_bias=True,  # of o_proj too: to be added once, not once a shard
    pad_token_id=0,
)
PAGE_SIZE, PAGES = 4, 24


def shard_of(family: type[CausalLM], shards: int) -> tuple[CausalLM, list[np.ndarray]]:
    """A model as a shard sees it, and random leaves of all shards, stacked; what is not dealt out is the same."""
    model = family(family.parse_config(FIELDS).for_shards(shards), dtype=jnp.float32)
    rng, leaves = np.random.default_rng(shards), []
    for _, parameter in loader.parameters_of(model):
        dealt = [RULES[axis] == TENSOR for axis in parameter.get_metadata()["axes"]]
        shape = [size // shards if cut else size for size, cut in zip(parameter.shape, dealt, strict=True)]
        parts = 0.3 * rng.standard_normal((shards if any(dealt) else 1, *shape))
        leaves.append(np.broadcast_to(parts, (shards, *shape)).astype(np.float32))
    return model, leaves


def hidden(
    family: type[CausalLM], shards: int, lengths: list[int], rung: int, axis: str | None, wanted=None
) -> tuple[np.ndarray, str]:
    """float32[shards, rung or rows, embed] of prompts, and the program."""
    model, leaves = shard_of(family, shards)
    treedef = jax.tree.structure(model)
    assert treedef.num_leaves == len(leaves)
    tables = shuffled_tables(np.random.default_rng(0), lengths, PAGE_SIZE, len(lengths) + 1, 4, PAGES)
    attention = metadata([0] * len(lengths), lengths, tables, PAGE_SIZE, rung)
    groups = 1 + max(layer.group for layer in model.layer_caches())
    step = StepMetadata((attention,) * groups, LinearMetadata(), wanted, stream_axis=axis)
    token_ids = jnp.asarray(np.random.default_rng(1).integers(0, 41, rung), jnp.int32)
    caches = [
        jnp.zeros(cache_shape(CacheSpec(PAGES, PAGE_SIZE, c.num_kv_heads, c.head_dim, jnp.float32), "reference").shape)
        for c in model.layer_caches()
    ]

    def run(leaves):
        return jax.tree.unflatten(treedef, leaves)(token_ids, caches, step)[0]

    mapped = jax.jit(jax.vmap(run, axis_name=TENSOR))
    return np.asarray(mapped(leaves)), str(jax.make_jaxpr(run, axis_env=[(TENSOR, shards)])([x[0] for x in leaves]))


@pytest.mark.parametrize(
    ("shards", "lengths", "rung", "wanted"),
    [
        (2, [1, 5, 2], 8, None),
        (4, [3, 2], 7, None),  # the last shard's rows are not all there
        (4, [1], 2, None),  # some shards have none at all
        (4, [6, 3], 9, [5, 8]),  # the last layer goes on with some of the rows
    ],
)
def test_hidden_rows(shards, lengths, rung, wanted):
    wanted = None if wanted is None else jnp.asarray(wanted)
    expected, whole = hidden(LlamaForCausalLM, shards, lengths, rung, None, wanted)
    found, dealt_out = hidden(LlamaForCausalLM, shards, lengths, rung, TENSOR, wanted)
    real = sum(lengths) if wanted is None else len(wanted)
    np.testing.assert_allclose(found[:, :real], expected[:, :real], rtol=1e-4, atol=1e-5)
    assert np.abs(expected[:, :real]).min(axis=-1).max() > 0
    np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))  # the same bits everywhere
    assert "all_gather" in dealt_out and "all_gather" not in whole


def test_where_it_cannot_be_the_stream_stays_whole():
    """Gemma adds norms of sums."""
    expected, whole = hidden(Gemma2ForCausalLM, 2, [1, 5], 8, None)
    found, program = hidden(Gemma2ForCausalLM, 2, [1, 5], 8, TENSOR)
    np.testing.assert_array_equal(found, expected)
    assert "all_gather" not in program + whole
