"""Gate and up projection with their activation on Hopper GPUs, in Mosaic GPU: neither product reaches memory.

A persistent kernel. One producer warpgroup streams tiles of x and of both halves of the weight by TMA through a ring
that goes on from one output tile to the next; each of two consumer warpgroups multiplies 64 rows with both halves, so
that a gate and the value it gates meet in the same registers. Two blocks of a cluster work on neighbouring rows and
share the weight's tiles by multicast.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..mosaic import tiled
from .reference import ACTIVATIONS

ROWS = 64  # of one consumer: the M of wgmma
CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class GatedConfig:
    """Tile sizes; those that were chosen by timing are in `tuned`.

    Attributes:
      columns: output columns of a tile; twice as many of the weight.
      depth: of x and the weight in a slot of the ring.
      slots: of the ring.
      cluster: blocks that share the weight's tiles, 1 or 2.
      band: tiles of columns that are worked on together, so that they stay in L2 while the rows pass.
      lag: steps of the ring that are multiplied before the oldest is waited for, 0 or 1.
      blocks: persistent blocks: one a multiprocessor.
    """

    columns: int
    depth: int
    slots: int
    cluster: int
    band: int
    lag: int
    blocks: int = 132

    @property
    def rows(self) -> int:
        """Rows of x that a cluster works on at a time."""
        return ROWS * CONSUMERS * self.cluster


def supports(x: jax.Array, weight: jax.Array, activation: str, config: GatedConfig) -> bool:
    """Whether whole tiles make up these shapes; rows below `config.rows` are better served by XLA's products."""
    (rows, depth), columns = x.shape, weight.shape[1] // 2
    fits = rows % config.rows == 0 and depth % config.depth == 0 and columns % config.columns == 0
    return fits and x.dtype == weight.dtype == jnp.bfloat16 and activation in ("silu", "gelu_tanh")


@functools.cache
def tuned() -> GatedConfig:
    """The sizes of `gpu_tuned.json`: timed on an H100 for T from 256 to 8192, K = 4096 and N = 14336."""
    return GatedConfig(**json.loads((Path(__file__).parent / "gpu_tuned.json").read_text()))


def _body(
    x_ref, weight_ref, out_ref, x_ring, gate_ring, up_ring, stage, filled, emptied,
    *, config: GatedConfig, activation: str,
):  # fmt: skip
    rows, depth = x_ref.shape
    columns = out_ref.shape[1]
    slots, steps = config.slots, depth // config.depth
    grid = rows // config.rows, columns // config.columns
    worker, member = lax.axis_index("wg"), lax.axis_index("cluster")
    shared = "cluster" if config.cluster > 1 else None
    clusters = config.blocks // config.cluster
    total = grid[0] * grid[1]

    def for_each_tile(body, carry):
        """body(first row of this block, first column, carry) for the tiles of this cluster."""

        def visit(wave, carry):
            index = wave * clusters + lax.axis_index("block")
            row, column = plgpu.planar_snake(index, grid, 1, config.band)
            row = (row * config.cluster + member) * (ROWS * CONSUMERS)
            return body(row, column * config.columns, carry)

        waves = lax.div(total - lax.axis_index("block") + clusters - 1, clusters)
        return lax.fori_loop(0, waves, visit, carry)

    @pl.when(worker == CONSUMERS)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")

        def tile(row, column, count):
            def step(index, count):
                slot = lax.rem(count, slots)
                pl.when(count >= slots)(lambda: plgpu.barrier_wait(emptied.at[slot]))
                low = pl.ds(index * config.depth, config.depth)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, ROWS * CONSUMERS), low], x_ring.at[slot], filled.at[slot])
                for ring, first in ((gate_ring, column), (up_ring, columns + column)):
                    source = weight_ref.at[low, pl.ds(first, config.columns)]
                    plgpu.copy_gmem_to_smem(source, ring.at[slot], filled.at[slot], collective_axes=shared)
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = for_each_tile(tile, jnp.int32(0))
        for slot in range(slots):  # nobody leaves while a copy or an arrival may still come
            pl.when(count > slot)(functools.partial(plgpu.barrier_wait, emptied.at[slot]))

    @pl.when(worker < CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")
        mine = pl.ds(worker * ROWS, ROWS)

        def tile(row, column, count):
            def multiply(gate_acc, up_acc):
                def step(index, count):
                    slot = lax.rem(count, slots)
                    plgpu.barrier_wait(filled.at[slot])
                    plgpu.wgmma(gate_acc, x_ring.at[slot, mine], gate_ring.at[slot])
                    plgpu.wgmma(up_acc, x_ring.at[slot, mine], up_ring.at[slot])
                    plgpu.wgmma_wait(2 * config.lag)
                    if config.lag:
                        pl.when(index > 0)(lambda: plgpu.barrier_arrive(emptied.at[lax.rem(count - 1, slots)]))
                    else:
                        plgpu.barrier_arrive(emptied.at[slot])
                    return count + 1

                lax.fori_loop(0, steps, step, count)
                if config.lag:
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(emptied.at[lax.rem(count + steps - 1, slots)])
                return gate_acc[...], up_acc[...]

            shape = ROWS, config.columns
            gate, up = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
            out = (ACTIVATIONS[activation](gate) * up).astype(out_ref.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage[worker] = out
            plgpu.commit_smem()
            target = out_ref.at[pl.ds(row + worker * ROWS, ROWS), pl.ds(column, config.columns)]
            plgpu.copy_smem_to_gmem(stage.at[worker], target)
            return count + steps

        for_each_tile(tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def gated_matmul(
    x: jax.Array, weight: jax.Array, *, activation: str, config: GatedConfig | None = None, interpret=False
) -> jax.Array:
    """See `api.gated_matmul`. Both products are summed in float32, and rounded once, after the activation."""
    config = config or tuned()
    columns = weight.shape[1] // 2
    if not supports(x, weight, activation, config):
        raise ValueError(
            f"{activation} of x {x.shape} {x.dtype.name} and weight {weight.shape} is not supported on GPU: bfloat16, "
            f"T a multiple of {config.rows}, K of {config.depth}, N of {config.columns}"
        )
    arrivals: dict[str, Any] = {"num_arrivals": CONSUMERS, "num_barriers": config.slots}
    alone = config.cluster == 1
    emptied = plgpu.Barrier(**arrivals) if alone else plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals)
    half = (config.slots, config.depth, config.columns)
    return plgpu.kernel(
        functools.partial(_body, config=config, activation=activation),
        out_type=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        scratch_types=(
            tiled((config.slots, ROWS * CONSUMERS, config.depth), x.dtype),
            tiled(half, x.dtype),
            tiled(half, x.dtype),
            tiled((CONSUMERS, ROWS, config.columns), x.dtype),
            plgpu.Barrier(num_arrivals=3, num_barriers=config.slots),
            emptied,
        ),
        grid=(config.blocks // config.cluster,),
        grid_names=("block",),
        cluster=(config.cluster,),
        cluster_names=("cluster",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="gated_matmul",
    )(x, weight)
