"""Counting optimized HLO: text whose count is known, and small programs that libtpu compiles."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.bench.floor import Work
from jaxllm.plan import hlo, hlo_cost
from tests.tpu_topology import compiling_for


@pytest.mark.parametrize(
    "text,size,space",
    [
        ("f32[]", 4, 0),
        ("pred[5]{0}", 5, 0),
        ("s4[5]{0}", 3, 0),
        ("f8e4m3fn[3,5]{1,0}", 15, 0),
        ("bf16[8,4096]{1,0:T(8,128)(2,1)S(1)}", 65536, 1),
        ("s32[256,17]{0,1:T(8,128)}", 24 * 256 * 4, 0),  # 17 columns are the sublanes: 24
        ("s32[256,17]{1,0:T(8,128)S(6)}", 256 * 128 * 4, 6),
        ("f32[3]{0:T(128)}", 512, 0),
        ("bf16[1,100]{1,0:T(1,128)(2,1)}", 2 * 128 * 2, 0),
        ("bf16[2,3,5,200]{3,1,2,0:T(8,128)(2,1)}", 2 * 5 * 8 * 256 * 2, 0),
    ],
)
def test_sizes_in_memory(text, size, space):
    (array,) = hlo.parse_shapes(text)
    assert (array.bytes, array.space) == (size, space)


PROGRAM = """\
HloModule m, is_scheduled=true

%cut (p.0: f32[1000,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[1000,128]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %b = f32[1000,128]{1,0} bitcast(%p.0)
  %zero = s32[] constant(0)
  ROOT %d = f32[8,128]{1,0} dynamic-slice(%b, %p.1, %zero), dynamic_slice_sizes={8,128}
}

%put (q.0: f32[1000,128], q.1: f32[8,128], q.2: s32[]) -> f32[1000,128] {
  %q.0 = f32[1000,128]{1,0} parameter(0)
  %q.1 = f32[8,128]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %u = f32[1000,128]{1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %none)
}

%body (s: (f32[128,128], s32[])) -> (f32[128,128], s32[]) {
  %s = (f32[128,128]{1,0}, s32[]) parameter(0)
  %x = f32[128,128]{1,0} get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %y = f32[128,128]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[128,128]{1,0}, s32[]) tuple(%y, %i)
}

%more (c: (f32[128,128], s32[])) -> pred[] {
  %c = (f32[128,128]{1,0}, s32[]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[1000,128], w: f32[128,128], at: s32[]) -> (f32[1000,128], f32[128,128]) {
  %a = f32[1000,128]{1,0} parameter(0)
  %w = f32[128,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %part = f32[8,128]{1,0} fusion(%a, %at), kind=kLoop, calls=%cut
  %new = f32[1000,128]{1,0} fusion(%a, %part, %at), kind=kLoop, calls=%put
  %near = (f32[128,128]{1,0:S(1)}, f32[128,128]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %there = f32[128,128]{1,0:S(1)} copy-done(%near)
  %twice = f32[128,128]{1,0:S(1)} add(%there, %there)
  %pages = f32[1000,128]{1,0} custom-call(%new, %w), custom_call_target="tpu_custom_call"
  %in = (f32[128,128]{1,0}, s32[]) tuple(%w, %at)
  %out = (f32[128,128]{1,0}, s32[]) while(%in), condition=%more, body=%body, BACKEND
  %last = f32[128,128]{1,0} get-tuple-element(%out), index=0
  ROOT %result = (f32[1000,128]{1,0}, f32[128,128]{1,0}) tuple(%pages, %last)
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_each_rule():
    module = hlo.parse(PROGRAM.replace("BACKEND", KNOWN))
    pages = lambda kernel, shape: kernel == "pages" and shape.dims == (1000, 128)
    found = hlo_cost.count(module, kernels={"pages": Work(70.0, 9.0)}, is_paged=pages)
    matrix, part = 128 * 128 * 4, 8 * 128 * 4
    by_name = {entry.name: entry.work for entry in found.entries}
    assert by_name == {
        "part": Work(2 * part + 4, 0.0),  # what is cut out is read and written, and the index
        "new": Work(2 * part + 4, 0.0),  # the update alone: in place
        "near": Work(matrix, 0.0),  # read from HBM; in VMEM nothing counts
        "pages": Work(70.0 + matrix, 9.0),
        "y": Work(3 * 3 * matrix, 3 * 2.0 * 128**3),
    }


def test_what_is_not_known_is_asked_for():
    module = hlo.parse(PROGRAM.replace("BACKEND", "backend_config={}"))
    with pytest.raises(ValueError, match="kernel 'pages'"):
        hlo_cost.count(module)
    with pytest.raises(ValueError, match="out: how often"):
        hlo_cost.count(module, kernels={"pages": Work()})
    found = hlo_cost.count(module, kernels={"pages": Work()}, loop_runs=5)
    assert found.work.flops == 5 * 2 * 128**3
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing")


def test_a_convolution():
    """3 × 3 over 10 × 20 with zeros around: products with those are not made."""
    module = hlo.parse("""\
HloModule m
ENTRY %main (x: f32[2,10,20,8], w: f32[3,3,8,16]) -> f32[2,10,20,16] {
  %x = f32[2,10,20,8]{3,2,1,0} parameter(0)
  %w = f32[3,3,8,16]{3,2,1,0} parameter(1)
  ROOT %y = f32[2,10,20,16]{3,2,1,0} convolution(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
""")
    assert hlo_cost.count(module).work.flops == 2 * (2 * 8 * 16) * (3 * 10 - 2) * (3 * 20 - 2)


# libtpu's own programs ------------------------------------------------------------------------------------------------


def compiled(function, *shapes, axes: tuple[int, ...] = (1,), specs=None, donate=()) -> hlo.Module:
    with compiling_for("v6e", axes, ("x",)) as mesh:
        shardings = [NamedSharding(mesh, spec) for spec in (specs or [P()] * len(shapes))]
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for (shape, dtype), sharding in zip(shapes, shardings)
        ]
        if specs is not None:
            function = jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=P(), check_vma=False)
        return hlo.parse(jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text())


BF16, F32, S32 = jnp.bfloat16, jnp.float32, jnp.int32


def test_a_product_moves_its_operands_and_its_result():
    found = hlo_cost.count(compiled(jnp.dot, ((4096, 8192), BF16), ((8192, 16384), BF16)))
    assert found.work.flops == 2 * 4096 * 8192 * 16384
    least = 2 * (4096 * 8192 + 8192 * 16384 + 4096 * 16384)
    assert least <= found.work.bytes < 1.001 * least


def test_products_of_a_batch():
    found = hlo_cost.count(
        compiled(functools.partial(jnp.einsum, "bij,bjk->bik"), ((6, 256, 512), F32), ((6, 512, 384), F32))
    )
    assert found.work.flops == 2 * 6 * 256 * 512 * 384


def test_rows_of_a_table_count_alone():
    found = hlo_cost.count(compiled(lambda table, at: table[at], ((200_000, 1024), BF16), ((64,), S32)))
    assert 64 * 1024 * 2 <= found.work.bytes < 5 * 64 * 1024 * 2


def test_a_table_updated_in_place():
    module = compiled(
        lambda table, row, at: lax.dynamic_update_slice(table, row, (at, 0)),
        ((200_000, 1024), BF16),
        ((8, 1024), BF16),
        ((), S32),
        donate=0,
    )
    assert hlo_cost.count(module).work.bytes < 10 * 8 * 1024 * 2
    assert not hlo_cost.copies(module, [0])


def test_a_loop_counts_as_often_as_it_runs():
    def repeated(x, w):
        return lax.fori_loop(0, 7, lambda _, x: jnp.dot(x, w), x)

    found = hlo_cost.count(compiled(repeated, ((256, 2048), BF16), ((2048, 2048), BF16)))
    assert found.work.flops == 7 * 2 * 256 * 2048 * 2048


def test_copies_are_found():
    shape = ((4096, 16384), BF16)
    assert hlo_cost.copies(compiled(lambda x: x.T, shape), [0])
    assert hlo_cost.copies(compiled(lambda x: x.reshape(8192, 8192), shape), [0])
    assert not hlo_cost.copies(compiled(lambda x, y: jnp.dot(y, x), shape, ((8, 4096), BF16)), [0])


def test_collectives():
    def exchange(x):
        return lax.psum(x, "x"), lax.all_gather(x[:8], "x")

    module = compiled(exchange, ((4 * 1024, 512), F32), axes=(4,), specs=[P("x")])
    found = {(each.kind, each.shapes[0].dims) for each in hlo_cost.collectives(module)}
    assert {kind for kind, _ in found} == {"all-reduce", "all-gather"}
    assert ("all-reduce", (1024, 512)) in found


def test_a_kernel_of_pallas_costs_what_is_said():
    def double(x):
        def body(x, out):
            out[...] = x[...] * 2

        return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="double_it")(x)

    module = compiled(double, ((1024, 1024), F32))
    found = hlo_cost.count(module, kernels={"double_it": Work(0.0, 5.0)})
    assert found.work.flops == 5
    assert found.work.bytes == 2 * 1024 * 1024 * 4
