"""What the TPU kernels copy and multiply as they run, in Pallas' interpreter, is what `tpu_traffic` says of them.

Every copy that starts is counted, and every product: a kernel that moves a whole page where a tile is meant, or
multiplies more keys than it has to, differs from its arithmetic here.
"""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu, tpu_decode, tpu_prefill, tpu_sizes, tpu_traffic, tpu_write
from tests.pallas_kernels.batches import Case
from tests.pallas_kernels.test_ragged_paged_attention_tpu import lay_out

# Rows of one token, and of less than a tile; that begin and end within tiles and pages; of more keys than a block.
DECODES = ((1, 1), (1, 8), (1, 17), (1, 113), (1, 640))
LONGER = ((2, 2), (40, 40), (33, 200), (64, 128), (7, 9), (90, 700))


class Counted:
    """Of each kernel by its name: bytes that were read and written, and FLOPs."""

    def __init__(self, monkeypatch, cache_shape: tuple[int, ...]):
        self.cache_shape = cache_shape
        self.sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.kernel = ""
        for module, name in ((tpu_decode, "decode"), (tpu_write, "write"), (tpu_prefill, "prefill")):
            monkeypatch.setattr(module, name, self.named(f"ragged_paged_{name}", getattr(module, name)))
        for module in (tpu_decode, tpu_prefill):
            for name in ("dot", "dot_transposed"):
                monkeypatch.setattr(module, name, self.multiplying(getattr(module, name)))
        monkeypatch.setattr(pltpu, "make_async_copy", functools.partial(self.copying, pltpu.make_async_copy))

    def add(self, what: str, size: int) -> None:
        """In the kernel that is traced: adds `size` whenever the program comes here."""
        sums = self.sums[self.kernel]
        jax.debug.callback(lambda: sums.update({what: size}))

    def named(self, kernel: str, call):
        def traced(*args, **options):
            self.kernel = kernel
            return call(*args, **options)

        return traced

    def multiplying(self, product):
        def counted(a, b):
            out = product(a, b)
            depth = math.isqrt(a.size * b.size // out.size)
            self.add("flops", 2 * out.size * depth)
            return out

        return counted

    def copying(self, make, source, target, semaphore):
        what = "written" if target.ref.shape == self.cache_shape else "read"
        size = math.prod(source.shape) * source.dtype.itemsize

        class Copy:
            def start(_):
                self.add(what, size)
                make(source, target, semaphore).start()

            def wait(_):
                make(source, target, semaphore).wait()

        return Copy()


@pytest.mark.parametrize(
    "chip,changes",
    [
        ("v6e", dict(rows=DECODES + LONGER)),
        pytest.param("tpu7x", dict(rows=DECODES + LONGER, page_size=32, window=70), marks=pytest.mark.slow),
        pytest.param("v5p", dict(rows=DECODES + LONGER, page_size=128), marks=pytest.mark.slow),
        pytest.param("v5e", dict(rows=DECODES + LONGER, head_dim=64, num_heads=14), marks=pytest.mark.slow),
        pytest.param("v4", dict(rows=DECODES, decodes_only=True, padding=0, page_size=32), marks=pytest.mark.slow),
        pytest.param("v6e", dict(rows=((32, 32),) * 16, padding=0), marks=pytest.mark.slow),
        pytest.param("v6e", dict(rows=((1100, 1100),), num_heads=2, num_kv_heads=1), marks=pytest.mark.slow),
    ],
)
def test_as_much_as_they_say(monkeypatch, chip, changes):
    case = Case(**{"head_dim": 128, "page_size": 64, "num_heads": 8, **changes})
    q, _, _, k, v, cache, metadata, options = case.build()
    q, k, v, cache = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, lay_out(cache)))
    counted = Counted(monkeypatch, cache.shape)
    attend = jax.jit(
        functools.partial(tpu.ragged_paged_attention, interpret=pltpu.InterpretParams(), chip=chip, **options)
    )
    jax.block_until_ready(attend(q, k, v, cache, metadata))
    jax.effects_barrier()

    problem = tpu_sizes.Problem(
        q.shape[0],
        case.num_kv_heads,
        case.num_heads // case.num_kv_heads,
        case.page_size,
        metadata.page_tables.shape[1],
        max(case.head_dim, tpu_sizes.LANES),
        cache.shape[3],
        2,
        2,
    )
    lengths, kv_lens = zip(*case.rows)
    said = tpu_traffic.of_step(chip, problem, lengths, kv_lens, decodes_only=case.decodes_only, window=case.window)
    token = case.num_kv_heads * cache.shape[3] * 2
    for kernel, traffic in said.items():
        found = counted.sums[kernel]
        once = token * sum(length for length in lengths if length > 1) if kernel == "ragged_paged_write" else 0
        assert found["read"] == traffic.read + once, kernel
        assert found["written"] == traffic.written, kernel
        assert found["flops"] == traffic.flops + traffic.filler_flops, kernel
