"""The reference and the XLA path of ragged paged attention against a dense float64 computation, and what they cost."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import (
    BACKENDS,
    AttentionMetadata,
    CacheSpec,
    cache_shape,
    ragged_paged_attention,
    xla,
)
from tests.pallas_kernels.batches import Case, dense

RAGGED = ((1, 1), (1, 37), (1, 64), (7, 7), (2, 50), (33, 40))

CASES = {
    "ragged": Case(RAGGED),
    "no rows": Case(()),
    "one token": Case(((1, 1),), padding=0),
    "one token of many": Case(((1, 130),), padding=0),
    "decodes only": Case(((1, 5), (1, 90), (1, 16), (1, 17))),
    "decodes only, promised": Case(((1, 5), (1, 90), (1, 16), (1, 17)), decodes_only=True),
    "decodes only, all at once": Case(
        ((1, 5), (1, 90), (1, 16)), window=20, cap=2.0, sinks=True, scales=True, decodes_only=True
    ),
    "no rows, promised": Case((), decodes_only=True),
    "prefills only": Case(((16, 16), (5, 37), (21, 21))),
    "one long prefill": Case(((200, 200),), num_heads=2, num_kv_heads=1, padding=0),
    "chunk after a long prefix": Case(((20, 600),), num_heads=2, num_kv_heads=1),
    "more rows than tokens": Case(((1, 9), (3, 12)), padding=11),
    "windows": Case(RAGGED, window=10),
    "a window of one": Case(RAGGED, window=1),
    "a window of a page": Case(RAGGED, window=16),
    "a window beyond all": Case(RAGGED, window=1000),
    "a window far back": Case(((1, 700), (40, 640)), num_heads=2, num_kv_heads=1, window=70),
    "caps": Case(RAGGED, cap=0.7),
    "sinks": Case(RAGGED, sinks=True),
    "scales": Case(RAGGED, scales=True),
    "all at once": Case(RAGGED, window=20, cap=2.0, sinks=True, scales=True),
    **{f"group of {g}": Case(RAGGED[1:5], num_heads=2 * g) for g in (1, 3, 7, 8)},
    **{
        f"pages of {size}": Case(RAGGED, page_size=size, window=w)
        for size, w in ((1, None), (8, 9), (32, 9), (128, 50))
    },
    **{f"heads of {dim}": Case(RAGGED[1:5], head_dim=dim) for dim in (96, 256)},
}


@functools.partial(jax.jit, static_argnames=("backend", "scale", "window", "cap"), donate_argnames="cache")
def attend(q, k, v, cache, metadata, **options):
    return ragged_paged_attention(q, k, v, cache, metadata, **options)


def check(case: Case, backend: str, q, keys, values, k, v, cache, metadata: AttentionMetadata, options) -> None:
    out, after = attend(q, k, v, cache, metadata, backend=backend, **options)
    out, after = np.asarray(out), np.asarray(after)
    np.testing.assert_allclose(out, dense(case, q, keys, values, options), atol=3e-6, rtol=3e-6)
    # the new keys and values are where they belong, and nothing else has changed but the dummy page
    expected = cache.copy()
    slots = np.asarray(metadata.write_slots)[: int(metadata.query_starts[metadata.num_rows])]
    for side, new, scale in ((0, k, options.get("k_scale", 1.0)), (1, v, options.get("v_scale", 1.0))):
        expected[slots // case.page_size, side, :, slots % case.page_size] = new[: len(slots)] / np.float32(scale)
    np.testing.assert_allclose(after[1:], expected[1:], rtol=1e-6)


# The reference has neither blocks nor loops, so that no shape is a case of its own: these name each of its options, and
# the batches at its edges.
OF_THE_REFERENCE = (
    "ragged", "no rows", "one token", "decodes only, promised", "chunk after a long prefix", "more rows than tokens",
    "a window of a page", "all at once", "decodes only, all at once", "group of 7", "pages of 8", "heads of 96",
)  # fmt: skip
# Each lies between two others, or is one of several that "all at once" has together.
BETWEEN_OTHERS = ("group of 3", "group of 8", "pages of 8", "pages of 32", "scales", "caps", "a window beyond all")


def is_quick(name: str, backend: str) -> bool:
    return name in OF_THE_REFERENCE if backend == "reference" else name not in BETWEEN_OTHERS


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[pytest.mark.slow] * (not is_quick(name, backend)))
        for name in CASES
        for backend in ("reference", "xla")
    ],
)
def test_against_dense(name, backend):
    """Everything that a row must not read is NaN: the dummy page, foreign pages, what has left the window, what has
    not been written yet, and the padding of q, k and v."""
    case = CASES[name]
    check(case, backend, *case.build())


def test_bfloat16():
    """Inputs and cache in bfloat16, arithmetic in float32: the error is that of rounding."""
    case = Case(RAGGED, window=20)
    q, keys, values, k, v, cache, metadata, options = case.build()

    def round_off(x):
        return x.astype(jnp.bfloat16).astype(np.float32)

    truth = dense(case, round_off(q), [round_off(x) for x in keys], [round_off(x) for x in values], options)
    for backend in ("reference", "xla"):
        half = (jnp.asarray(x.astype(jnp.bfloat16)) for x in (q, k, v, cache))
        out, _ = attend(*half, metadata, backend=backend, **options)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), truth, atol=0.02, rtol=0.01)


def test_extreme_scores():
    """Scores of thousands neither overflow nor lose the online softmax's running maximum."""
    case = Case(RAGGED)
    q, keys, values, k, v, cache, metadata, options = case.build()
    options = options | {"scale": 300.0}
    for backend in ("reference", "xla"):
        out, _ = attend(q, k, v, cache, metadata, backend=backend, **options)
        np.testing.assert_allclose(out, dense(case, q, keys, values, options), atol=2e-3, rtol=1e-3)


def test_a_row_does_not_depend_on_its_batch():
    """The same row alone and among others, chunked and whole: equal to the last bits of float32."""
    row, others = (30, 50), ((1, 5), (1, 90), (7, 7))
    q, keys, values, k, v, cache, metadata, options = Case((*others, row)).build()
    together, _ = attend(q, k, v, cache, metadata, backend="xla", **options)
    first = sum(length for length, _ in others)
    tables = np.asarray(metadata.page_tables)[len(others) : len(others) + 2]
    from tests.pallas_kernels.batches import metadata as make

    parts, state = [], cache
    for start, length in ((20, 13), (33, 17)):
        at = slice(first + start - 20, first + start - 20 + length)
        alone = make([start], [length], tables, 16, length)
        part, state = attend(q[at], k[at], v[at], state, alone, backend="xla", **options)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts), np.asarray(together)[first : first + 30], atol=1e-6)


@pytest.fixture
def count_chunks(monkeypatch):
    """Counts how often the XLA path takes in a set of keys, at run time."""
    taken: list[int] = []
    accumulate = xla._accumulate

    def counting(*args, **kwargs):
        jax.debug.callback(lambda: taken.append(1))
        return accumulate(*args, **kwargs)

    monkeypatch.setattr(xla, "_accumulate", counting)

    def count(case: Case) -> int:
        *_, q_and_rest = [case.build()]
        q, _, _, k, v, cache, metadata, options = q_and_rest
        taken.clear()
        # a new function, so that no trace from before is found
        jax.block_until_ready(jax.jit(lambda *a: xla.ragged_paged_attention(*a, **options))(q, k, v, cache, metadata))
        jax.effects_barrier()
        return len(taken)

    return count


def test_cost_follows_the_contexts_present(count_chunks):
    """Decodes take as many steps as the longest context has pages, blocks of queries as theirs have chunks; the width
    of the page tables costs nothing."""
    wide = 2000
    assert count_chunks(Case(((1, 40), (1, 20)), width=wide)) == 3
    assert count_chunks(Case(((1, 400), (1, 20)), width=wide)) == 25
    assert count_chunks(Case(((1, 400), (1, 20)), width=wide, window=30)) <= 3
    assert count_chunks(Case(((100, 100),), width=wide)) == 1
    assert count_chunks(Case(((10, 700),), width=wide)) == 3
    assert count_chunks(Case(((10, 700),), width=wide, window=30)) <= 1
    assert count_chunks(Case(((1, 40), (100, 100), (10, 700)), width=wide)) == 3 + 1 + 3
    assert count_chunks(Case((), width=wide)) == 0
    assert count_chunks(Case(((1, 40), (1, 20)), width=wide, decodes_only=True)) == 3


@pytest.mark.parametrize("tokens", [4, 300])
def test_memory_follows_the_contexts_present(tokens):
    """The program holds nothing as large as the page tables' capacity, and updates the donated cache in place."""
    rows, width, heads, dim = 4, 4096, 2, 64
    spec = CacheSpec(num_pages=50, page_size=16, num_kv_heads=heads, head_dim=dim, dtype=jnp.dtype(jnp.float32))

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    metadata = AttentionMetadata(
        ints(tokens), ints(tokens), ints(rows + 1), ints(rows), ints(rows, width), ints(tokens), ints(), ints()
    )
    new = jax.ShapeDtypeStruct((tokens, heads, dim), jnp.float32)
    cache = cache_shape(spec, "xla")
    compiled = attend.lower(new, new, new, cache, metadata, backend="xla", scale=1.0, window=None, cap=None).compile()
    hlo = compiled.as_text()
    for shape in set(re.findall(r"[a-z0-9]+\[([\d,]+)\]", hlo)):
        dims = [int(dim) for dim in shape.split(",")]
        assert width * spec.page_size not in dims
        assert tuple(dims) in {(rows, width), (rows, width + xla.BLOCK_KEYS // 16)} or not {width, width + 16} & set(
            dims
        )
    cache_text = re.escape(f"f32[{','.join(map(str, cache.shape))}]")
    copies = re.findall(rf"= {cache_text}\S* copy\(.*", hlo)
    assert not copies, copies
    # the cache itself is aliased; what else the program holds is smaller
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(cache.shape) * 4 + 8e6


def test_checks():
    """Shapes that do not fit, and what a backend lacks, are refused before anything is computed."""
    case = Case(((1, 5),))
    q, _, _, k, v, cache, metadata, options = case.build()
    call = functools.partial(ragged_paged_attention, cache=cache, metadata=metadata, backend="xla")
    with pytest.raises(ValueError, match="must be"):
        call(q[..., :32], k, v, **options)
    with pytest.raises(ValueError, match="multiple"):
        call(q[:, :3], k, v, **options)
    with pytest.raises(ValueError, match="window"):
        call(q, k, v, **(options | {"window": 0}))
    promise = dataclasses.replace(metadata, decodes_only=True)
    with pytest.raises(ValueError, match="decodes_only"):
        ragged_paged_attention(q[:2], k[:2], v[:2], cache, promise, backend="xla", **options)
    with pytest.raises(ValueError, match=", ".join(BACKENDS)):
        ragged_paged_attention(q, k, v, cache, metadata, **(options | {"backend": "cuda"}))
