"""Projection to rotated heads on TPU against float32, in interpret mode with race detection, and through libtpu."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxllm.models.rope import Rope
from pallas_kernels.gated_matmul import tpu as gated_matmul
from pallas_kernels.qk_norm_rope import Heads
from pallas_kernels.qk_norm_rope import tpu as qk_norm_rope
from pallas_kernels.qkv_projection import has_kernel, qkv_projection, tpu
from pallas_kernels.ragged_paged_attention.tpu_sizes import chips
from tests.tpu_topology import abstract, compiling_for, kernel_vmem

INTERPRET = pltpu.InterpretParams(detect_races=True)


def _inputs(tokens: int, depth: int, heads: Heads):
    keys = jax.random.split(jax.random.key(tokens + heads.width), 4)
    x = jax.random.normal(keys[0], (tokens, depth), jnp.bfloat16)
    weight = (jax.random.normal(keys[1], (depth, heads.width)) * depth**-0.5).astype(jnp.bfloat16)
    norms = tuple((1 + jax.random.normal(key, (heads.dim,)) / 4).astype(jnp.bfloat16) for key in keys[2:])
    rope = Rope(tuple(10000.0 ** -(np.arange(heads.dim // 2) / 64)))
    return x, weight, rope.tables(jnp.arange(tokens) + 5), norms


@pytest.mark.parametrize(
    ("heads", "depth", "sizes", "is_normed"),
    [
        (Heads(2, 2, 128, 1e-6), 256, tpu.Sizes(512, 256, 256), True),  # rows stay, strips of two heads pass
        (Heads(4, 2, 128, 1e-6), 256, tpu.Sizes(256, 256, 128), True),  # blocks of rows; sums over parts of the depth
        (Heads(3, 1, 128), 128, tpu.Sizes(512, 128, 128), False),  # strips of one head
        (Heads(2, 2, 256, 1e-6, unit_offset=True), 128, tpu.Sizes(256, 256, 128, 2), True),  # split between two cores
        (Heads(4, 4, 128), 128, tpu.Sizes(512, 256, 128, 2), False),
    ],
)
def test_kernel_against_float32(capfd, heads, depth, sizes, is_normed):
    x, weight, tables, norms = _inputs(512, depth, heads)
    given = norms if is_normed else None
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=sizes.parts)
    got = tpu.qkv_projection(x, weight, tables, given, heads, sizes=sizes, interpret=interpret)
    assert "RACE DETECTED" not in capfd.readouterr().out
    wide = [each.astype(jnp.float32) for each in (x, weight, *norms)]
    exact = qkv_projection(*wide[:2], tables, tuple(wide[2:]) if is_normed else None, heads, backend="reference")
    for left, right, count in zip(got, exact, (heads.queries, heads.keys, heads.keys), strict=True):
        assert left.shape == right.shape == (512, count, heads.dim) and left.dtype == jnp.bfloat16
        error = np.abs(np.asarray(left, np.float32) - np.asarray(right))
        np.testing.assert_array_less(error / np.abs(right).max(axis=2, keepdims=True), 1.2e-2)


def test_a_row_does_not_depend_on_the_others():
    heads = Heads(2, 2, 128, 1e-6)
    x, weight, tables, norms = _inputs(512, 128, heads)
    run = functools.partial(tpu.qkv_projection, sizes=tpu.Sizes(256, 256, 128), interpret=INTERPRET)
    alone = run(x, weight, tables, norms, heads)
    among = run(x.at[300:].set(jnp.nan), weight, tables, norms, heads)
    for left, right in zip(among, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(left[:300], np.float32), np.asarray(right[:300], np.float32))
        assert jnp.isnan(left[300:]).all()


SHAPES = {  # depth and heads of a shard
    "llama-3.1-8b": (4096, Heads(32, 8, 128)),
    "llama-3.1-8b, 4 shards": (4096, Heads(8, 2, 128)),
    "llama-3.3-70b, 16 shards": (8192, Heads(4, 1, 128)),
    "qwen3-0.6b": (1024, Heads(16, 8, 128, 1e-6)),
    "gemma-2-2b": (2304, Heads(8, 4, 256)),
}


@pytest.mark.parametrize("chip", chips())
@pytest.mark.parametrize("model", SHAPES)
def test_sizes_divide_the_shapes_and_fit(model, chip):
    """Blocks are as large as VMEM allows; where even the least does not fit, XLA's product is left."""
    depth, heads = SHAPES[model]
    room = chips()[chip].vmem_limit_bytes
    for rows in (256, 768, 2048, 8192):
        sizes = tpu.sizes_for(rows, depth, heads, 2, chips()[chip])
        if sizes is None:
            assert tpu.Sizes(tpu.TILE_ROWS, 128, 128).vmem(depth, 2) > room / 2
            continue
        assert rows % sizes.rows == 0 and sizes.rows % tpu.TILE_ROWS == 0 and depth % sizes.depth == 0
        assert sizes.columns % heads.dim == 0 and heads.queries * heads.dim % (sizes.columns * sizes.parts) == 0
        assert heads.keys * heads.dim % (sizes.columns * sizes.parts) == 0 and sizes.vmem(depth, 2) <= room
        moved = tpu.traffic(rows, depth, heads, 2, chip)
        assert moved is not None and moved.flops == 2 * rows * depth * heads.width
        assert moved.read == 2 * depth * (rows // sizes.rows * heads.width + (sizes.parts - 1) * rows)


@pytest.mark.parametrize(
    ("chip", "model"),
    [
        case if case == ("tpu7x", "qwen3-0.6b") else pytest.param(*case, marks=pytest.mark.slow)
        for case in ((chip, model) for chip in chips() for model in SHAPES)
    ],
)
def test_it_compiles(chip, model):
    depth, heads = SHAPES[model]
    with compiling_for(chip, (1,), ("x",)) as mesh:
        bfloat16 = functools.partial(abstract, mesh, dtype=jnp.bfloat16)
        table = abstract(mesh, (2048, heads.dim // 2), jnp.float32)
        x, weight, norm = bfloat16((2048, depth)), bfloat16((depth, heads.width)), bfloat16((heads.dim,))
        offered = tpu.supports(x, weight, (table, table), heads)
        assert has_kernel(x, weight, (table, table), heads, "tpu") == (offered and chip in ("v5p", "tpu7x"))
        if not offered:
            assert chip == "v4"
            return
        run = jax.jit(lambda x, weight, tables, norms: tpu.qkv_projection(x, weight, tables, norms, heads))
        text = run.lower(x, weight, (table, table), (norm, norm)).compile().as_text()
    assert kernel_vmem(text)["qkv_projection_2048"] <= chips()[chip].vmem_limit_bytes


def test_what_the_kernel_lacks_is_left_to_xla_or_refused():
    heads = Heads(2, 1, 128)
    x, weight, tables, _ = _inputs(512, 128, heads)
    assert tpu.supports(x, weight, tables, heads) and not has_kernel(x, weight, tables, heads, "gpu")
    halved = tuple(table[:, :32] for table in tables)  # part of a head is rotated
    assert has_kernel(x, weight, halved, heads, "reference") and not tpu.supports(x, weight, halved, heads)
    short = tuple(table[:300] for table in tables)
    assert not tpu.supports(x[:300], weight, short, heads)
    wide = x.astype(jnp.float32), weight.astype(jnp.float32)
    assert not tpu.supports(*wide, tables, heads)
    with pytest.raises(ValueError, match="T a multiple of 256"):
        tpu.qkv_projection(x[:300], weight, short, None, heads)
    with pytest.raises(ValueError, match=r"weight \(128, 512\) \[K, 256\]"):
        qkv_projection(x, weight, tables, None, Heads(1, 0, 256), backend="reference")
    with pytest.raises(ValueError, match="'xla' is unknown"):
        qkv_projection(x, weight, tables, None, heads, backend="xla")


def test_decodes_take_kernels_where_xla_leaves_no_result_on_the_chip():
    """v5p's two cores exchange results through HBM; elsewhere those of so few rows stay, and XLA fetches weights while
    attention runs."""
    for chip in chips():
        assert qk_norm_rope.keeps_decodes(chip) == gated_matmul.keeps_decodes(chip) == (chip != "v5p")
        assert tpu.gains(chip, of_decodes=True) == (chip == "v5p")
        assert tpu.gains(chip) == (chip in ("v5p", "tpu7x"))
