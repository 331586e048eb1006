"""The sum over shards and the norm for few rows, through memory that each device keeps for the others to write to.

Each device writes its part of a row into the owner's memory, the owner adds all parts to its row of the residual stream
and writes the norm into everybody's memory, from where each copies it to the result (a reduce-scatter and an all-gather
by pushes alone). Nobody reads what is far away, and nobody but the kernels themselves waits for anything: blocks of the
same number on all devices signal each other. So it is a kernel like any other for XLA, part of a CUDA graph, where
`gpu.py` costs the host some 50 µs at each launch, in which addresses are exchanged.

A device's memory, `memory_size` bytes that are zeros at first, has

    the number of the last call, and how many blocks of the present one are done
    for each device and block the number of the call whose parts have come, and that whose norms have come
    twice, for calls of even and odd numbers: each device's parts of the rows that this one owns; the norms of all rows

Two are enough: who writes for call k has seen all devices begin call k - 1, hence end call k - 2. A flag is never ahead
of the call that waits for it: nobody begins the next one before all have come to the end of this one.

The first run of a program needs another that brings its devices together: loading a module or making a CUDA graph may
wait for what runs on another device, which here may wait for it. XLA does it for programs in which a collective of its
own, or a kernel of `gpu.py`, stands: one is enough, before all of these (`jaxllm.models.decoder`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import peer_memory_gpu as memory
from .gpu import BLOCKS, LANES, WIDTH, _vector

MAX_ROWS = 512  # beyond it, bandwidth decides, and TMA has more of it
ALIGNMENT = 1024  # bytes, of what the memory is divided into


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Layout:
    """Offsets in bytes of a device's memory, for rows of `width` bfloat16 over so many devices."""

    CALL, DONE = 0, 4

    def __init__(self, width: int, devices: int):
        self.row, self.devices = width * 2, devices
        self.most = -(-MAX_ROWS // devices)  # rows that a device may own
        self.parts_have_come = ALIGNMENT
        self.norms_have_come = self.parts_have_come + _aligned(devices * BLOCKS * 4)
        self.parts = self.norms_have_come + _aligned(devices * BLOCKS * 4)
        self.half = _aligned(devices * self.most * self.row)
        self.norms = self.parts + 2 * self.half
        self.size = self.norms + 2 * self.half

    def flag(self, which: int, device, block):
        """Where the flag of a device's block lies, `which` being one of the two offsets."""
        return which + (device * BLOCKS + block) * 4

    def part(self, half, device, row):
        """Where a device's part of the owner's row lies."""
        return self.parts + half * self.half + (device * self.most + row) * self.row

    def norm(self, half, device, row):
        """Where the norm of a row that a device owns lies."""
        return self.norms + half * self.half + (device * self.most + row) * self.row


def memory_size(width: int, devices: int) -> int:
    """Bytes of each device's memory."""
    return Layout(width, devices).size


def all_reduce_rms_norm(
    x: jax.Array,
    update: jax.Array,
    weight: jax.Array,
    peers: jax.Array,
    *,
    axis: str,
    eps: float,
    unit_offset: bool,
    blocks: int = BLOCKS,
) -> tuple[jax.Array, jax.Array]:
    """See `api.all_reduce_rms_norm`; of at most MAX_ROWS rows.

    Args:
      peers: int32[devices + 1, 2], the lower and upper halves of the addresses of all devices' memory; in the last row
        this device's place in the axis, and 0.
    """
    devices = lax.axis_size(axis)
    (rows, width), dtype = update.shape, update.dtype
    at, pieces = Layout(width, devices), width // WIDTH
    own = -(-rows // devices)
    blocks = min(blocks, own)
    layout = plgpu.Layout.WG_STRIDED((pieces, WIDTH), vec_size=_vector(width))
    owned = [min(max(rows - device * own, 0), own) for device in range(devices)]

    def body(x_ref, update_ref, weight_ref, peers_ref, sum_ref, out_ref):
        block, here = lax.axis_index("block"), peers_ref[devices, 0]
        peer = [(peers_ref[device, 0], peers_ref[device, 1]) for device in range(devices)]
        mine = peers_ref[here, 0], peers_ref[here, 1]
        call = memory.read(mine, jnp.int32(at.CALL)) + 1
        half = lax.bitwise_and(call, 1)

        def rows_at(row):
            return pl.ds(row * pieces, pieces)

        def load(ref):
            return plgpu.load(ref, layout=layout, optimized=False)

        def fetch(offset):
            return memory.fetch((pieces, WIDTH), dtype, layout, mine, offset)

        def signal(which):
            memory.signal(peers_ref, devices, at.flag(which, here, block), call)

        def wait(which):
            memory.wait(mine, at.flag(which, 0, block), BLOCKS * 4, devices, call)

        for device in range(devices):

            @pl.loop(block, owned[device], step=blocks)
            def _(row, device=device):
                part = load(update_ref.at[rows_at(device * own + row)])
                memory.push(part, layout, peer[device], at.part(half, here, row))

        signal(at.parts_have_come)
        wait(at.parts_have_come)

        @pl.loop(block, jnp.clip(rows - here * own, 0, own), step=blocks)
        def _(row):
            total = load(x_ref.at[rows_at(row)]).astype(jnp.float32)
            for device in range(devices):
                total = total + fetch(at.part(half, device, row)).astype(jnp.float32)
            rounded = total.astype(dtype)
            sum_ref[rows_at(row)] = rounded
            wide = rounded.astype(jnp.float32)
            normed = wide * lax.rsqrt(jnp.sum(wide * wide) / width + eps)
            scale = load(weight_ref)
            if unit_offset:
                normed = (normed * (1.0 + scale.astype(jnp.float32))).astype(dtype)
            else:
                normed = normed.astype(dtype) * scale
            for device in range(devices):
                memory.push(normed, layout, peer[device], at.norm(half, here, row))

        signal(at.norms_have_come)
        wait(at.norms_have_come)
        for device in range(devices):

            @pl.loop(block, owned[device], step=blocks)
            def _(row, device=device):
                out_ref[rows_at(device * own + row)] = fetch(at.norm(half, device, row))

        memory.leave(mine, jnp.int32(at.DONE), blocks, jnp.int32(at.CALL), call)

    flat = (-1, WIDTH)
    total, normed = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((own * pieces, WIDTH), dtype),
            jax.ShapeDtypeStruct((rows * pieces, WIDTH), dtype),
        ),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=LANES * 4),
        kernel_name="all_reduce_rms_norm",
    )(x.reshape(flat), update.reshape(flat), weight.reshape(flat), peers)
    return total.reshape(x.shape), normed.reshape(update.shape)
