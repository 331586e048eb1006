"""Runs a model over paged caches without the engine: one sequence in steps of any length, beside a row of another."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint import open_checkpoint
from jaxllm.models.decoder import CausalLM
from jaxllm.models.loader import load
from jaxllm.models.metadata import LinearMetadata, StepMetadata
from jaxllm.models.registry import model_class
from pallas_kernels.ragged_paged_attention import CacheSpec
from tests.pallas_kernels.batches import empty_cache, metadata, release, shuffled_tables

GOLDENS = Path(__file__).parent / "goldens"
PAGE_SIZE = 4
ROWS = 3  # the sequence, or a companion of one token and the sequence, then padding


def load_golden(family: str, max_length: int | None = None) -> CausalLM:
    """A tiny checkpoint as float32; `max_length` as in `DecoderConfig.for_length`."""
    checkpoint = open_checkpoint(GOLDENS / family)
    cls = model_class(checkpoint.config)
    config = cls.parse_config(checkpoint.config)
    model = cls(config if max_length is None else config.for_length(max_length), dtype=jnp.float32)
    load(model, checkpoint)
    return model


@functools.partial(jax.jit, donate_argnums=1)
def _step(model: CausalLM, caches, token_ids, step_metadata: StepMetadata):
    hidden, caches = model(token_ids, caches, step_metadata)
    return model.logits(hidden, step_metadata.linear), caches


def run(
    model: CausalLM,
    tokens: np.ndarray,
    lengths: list[int],
    backend: str,
    *,
    rung: int,
    output_rows: np.ndarray | None = None,
) -> np.ndarray:
    """float32[len(tokens), vocab], the logits of a sequence computed in steps of `lengths`, each padded to `rung`
    tokens; of a single step those of `output_rows` alone, if given. Pages are shuffled, NaN until they are written, and
    released once they have left their layer's window. Where a rung has room, another sequence takes a decode step
    first."""
    rng = np.random.default_rng(1)
    layers = model.layer_caches()
    width = -(-max(len(tokens), rung) // PAGE_SIZE) + 1  # so that sequences of one rung share a program
    num_pages = 2 * width + 3
    groups = {layer.group: layer.window for layer in layers}
    # row 0 is the companion: one token at position 0, over and over
    tables = {
        group: shuffled_tables(rng, [1, len(tokens)], PAGE_SIZE, ROWS, width, num_pages) for group in sorted(groups)
    }
    specs = [CacheSpec(num_pages, PAGE_SIZE, c.num_kv_heads, c.head_dim, jnp.dtype(jnp.float32)) for c in layers]
    caches = [jnp.asarray(empty_cache(spec, backend)) for spec in specs]
    logits, start = [], 0
    for length in lengths:
        companion = rung > length
        starts = [0, start] if companion else [start]
        attention = tuple(
            metadata(
                starts,
                [1, length] if companion else [length],
                release(table if companion else np.roll(table, -1, axis=0), starts, PAGE_SIZE, groups[group]),
                PAGE_SIZE,
                rung,
            )
            for group, table in tables.items()
        )
        ids = np.zeros(rung, np.int32)
        ids[companion : companion + length] = tokens[start : start + length]
        wanted = None if output_rows is None else jnp.asarray(output_rows + companion)
        chunk = StepMetadata(attention, LinearMetadata(), wanted, backend=backend)
        result, caches = _step(model, caches, jnp.asarray(ids), chunk)
        if output_rows is not None:
            return np.asarray(result)
        logits.append(np.asarray(result)[companion : companion + length])
        start += length
    assert start == len(tokens)
    return np.concatenate(logits)
