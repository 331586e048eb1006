"""Checks and times the kernel on all GPUs of this machine, for no interpreter runs it:

python -m pallas_kernels.all_reduce_rms_norm.stress_gpu [--widths 8192,4096] [--rows 1,2,33,256,4096] [--rounds 20]

Each width and number of rows, with and without `peers` where there are both, over random summands with rows of large
values between them, against the reference in float32: the worst error, and whether the rounds gave the same bits on all
devices, with other work of these between them; and microseconds a call in a chain, beside an all-reduce of XLA's with
the norm of `add_rms_norm` behind it. Then programs of many sums in which devices are late.
"""

import argparse
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..add_rms_norm import add_rms_norm
from . import all_reduce_rms_norm, open_memory
from .gpu_symmetric import MAX_ROWS

TENSOR = "tensor"
CHAIN = 40  # calls in one program


def _brought_together(x: jax.Array) -> jax.Array:
    """`x`, by a collective of XLA's: the first run of a program with `peers` needs one, see `gpu_symmetric`."""
    return jnp.where(jnp.isnan(jax.lax.psum(x[0, 0], TENSOR)), jnp.nan, x)


def _shared(function, mesh, chain: int = 1):
    """function(x, update, weight) -> (x, normed) on each device, `chain` times; the norm makes the next update."""

    def run(x, update, weight, peers):
        x = _brought_together(x)

        def step(_, carry):
            x, update = carry
            x, normed = function(x, update * jnp.bfloat16(0.5), weight, peers=peers)
            return x, normed

        return step(0, (x, update)) if chain == 1 else jax.lax.fori_loop(0, chain, step, (x, update))

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(TENSOR), P(TENSOR), P(), P(TENSOR)),
        out_specs=(P(TENSOR), P(TENSOR)),
        check_vma=False,
    )
    return jax.jit(sharded)


def _whole(x, update, weight, peers):
    del peers
    return add_rms_norm(x, jax.lax.psum(update, TENSOR), weight, eps=1e-5, backend="gpu")


def _microseconds(run, *arguments) -> float:
    for _ in range(2):
        jax.block_until_ready(run(*arguments))
    start = time.perf_counter()
    for _ in range(3):
        out = run(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / 3 / CHAIN * 1e6


def check(mesh, width: int, rows: int, rounds: int, peers: jax.Array | None) -> tuple[float, bool]:
    """Of the worst relative error of a row's norm, and whether all rounds and devices agree."""
    devices = mesh.size
    own = -(-rows // devices)
    sharded, alike = NamedSharding(mesh, P(TENSOR)), NamedSharding(mesh, P())
    sums = functools.partial(all_reduce_rms_norm, axis=TENSOR, eps=1e-5)
    kernel = _shared(functools.partial(sums, backend="gpu"), mesh)
    truth = _shared(functools.partial(sums, backend="reference"), mesh)
    noise = _shared(_whole, mesh)
    worst, agree = 0.0, True
    first: list[np.ndarray] = []
    for turn in range(rounds):
        keys = jax.random.split(jax.random.key(turn // 2), 3)  # each twice
        large = 10.0 ** jax.random.randint(keys[2], (devices * rows, 1), -3, 4)
        x = jax.device_put(jax.random.normal(keys[0], (devices * own, width), jnp.bfloat16), sharded)
        update = (large * jax.random.normal(keys[1], (devices * rows, width))).astype(jnp.bfloat16)
        update = jax.device_put(update, sharded)
        weight = jax.device_put(jnp.linspace(0.5, 1.5, width).astype(jnp.bfloat16), alike)
        if turn % 3 == 0:
            noise(update, update, weight, None)
        stream, normed = kernel(x, update, weight, peers)
        normed = np.asarray(normed, np.float32).reshape(devices, rows, width)
        kept = np.asarray(stream, np.float32)[:rows]
        if turn % 2 == 0:
            wide = [array.astype(jnp.float32) for array in (x, update, weight)]
            expected = np.asarray(truth(*wide, None)[1], np.float32)[:rows]
            error = np.abs(normed[0] - expected).max(axis=1) / np.abs(expected).max(axis=1)
            worst, first = max(worst, float(error.max())), [normed, kept]
        else:
            agree = agree and all(np.array_equal(*pair) for pair in zip(first, (normed, kept), strict=True))
        agree = agree and bool((normed == normed[:1]).all())
    return worst, agree


def _delayed(update: jax.Array, device: int, loops: int) -> jax.Array:
    """`update`, on one of the devices after so many turns of a loop of small kernels."""
    turns = jnp.where(jax.lax.axis_index(TENSOR) == device, loops, 0)
    waste = jax.lax.fori_loop(0, turns, lambda _, x: jnp.sin(x) + 1.0, update[:1].astype(jnp.float32))
    return jnp.where(jnp.isnan(waste[0, 0]), jnp.nan, update)


def check_chain(mesh, width: int, peers: jax.Array, seed: int) -> tuple[float, bool]:
    """What `check` finds, for a program of 24 sums of random numbers of rows, each row of which has the norm before it
    added; before some of them one of the devices is late. It runs four times without waiting in between."""
    random, devices = np.random.default_rng(seed), mesh.size
    sizes = [int(size) for size in random.choice([1, 2, 3, 8, 33, 100, 256, MAX_ROWS - 1, MAX_ROWS], 24)]
    late = {int(at): (int(random.integers(devices)), int(random.integers(1, 400))) for at in random.choice(24, 6)}

    def run(backend, numbers, weight, peers):
        numbers, normed, found = _brought_together(numbers), jnp.zeros((1, width), numbers.dtype), []
        for at, rows in enumerate(sizes):
            update = numbers[at : at + rows] + normed[:1]
            if at in late:
                update = _delayed(update, *late[at])
            own = -(-rows // devices)
            x = jnp.zeros((own, width), update.dtype)
            _, normed = all_reduce_rms_norm(
                x, update, weight, axis=TENSOR, eps=1e-5, backend=backend, peers=None if at == 0 else peers
            )
            found.append(normed)
        return jnp.concatenate(found)

    def program(backend):
        specs = (P(TENSOR), P(), P(TENSOR))
        return jax.jit(
            jax.shard_map(
                functools.partial(run, backend), mesh=mesh, in_specs=specs, out_specs=P(TENSOR), check_vma=False
            )
        )

    numbers = jax.random.normal(jax.random.key(seed), (devices * (MAX_ROWS + 24), width), jnp.bfloat16)
    numbers = jax.device_put(numbers, NamedSharding(mesh, P(TENSOR)))
    weight = jax.device_put(jnp.linspace(0.5, 1.5, width).astype(jnp.bfloat16), NamedSharding(mesh, P()))
    kernel = program("gpu")
    runs = [kernel(numbers, weight, peers) for _ in range(4)]
    found = [np.asarray(each, np.float32).reshape(devices, sum(sizes), width) for each in runs]
    expected = np.asarray(program("reference")(numbers, weight, peers), np.float32)[: sum(sizes)]
    error = np.abs(found[0][0] - expected).max(axis=1) / np.abs(expected).max(axis=1)
    return float(error.max()), all(bool((each == found[0][:1]).all()) for each in found)


def check_and_time(
    widths: Sequence[int] = (8192, 4096), all_rows: Sequence[int] = (1, 2, 33, 256, 4096), rounds: int = 20
) -> int:
    """Prints a line for each size; how many were wrong."""
    mesh, wrong = jax.make_mesh((len(jax.devices()),), (TENSOR,), axis_types=(AxisType.Auto,)), 0
    sharded, alike = NamedSharding(mesh, P(TENSOR)), NamedSharding(mesh, P())
    for width in widths:
        memory, addresses = open_memory(mesh, TENSOR, width)
        for rows, peers in [(rows, peers) for rows in all_rows for peers in (None, addresses)]:
            if peers is not None and rows > MAX_ROWS:
                continue
            error, agree = check(mesh, width, rows, rounds, peers)
            wrong += not (agree and error < 1e-2)
            own = -(-rows // mesh.size)
            ones = functools.partial(jnp.ones, dtype=jnp.bfloat16)
            update, weight = (
                jax.device_put(ones((mesh.size * rows, width)), sharded),
                jax.device_put(ones(width), alike),
            )
            dealt, whole = (jax.device_put(ones((mesh.size * n, width)), sharded) for n in (own, rows))
            kernel = functools.partial(all_reduce_rms_norm, axis=TENSOR, eps=1e-5, backend="gpu")
            times = [
                _microseconds(_shared(function, mesh, CHAIN), x, update, weight, peers)
                for function, x in ((kernel, dealt), (_whole, whole))
            ]
            found = f"worst relative error {error:.1e}, {'the same bits' if agree else 'DIFFERENT BITS'}"
            spent = f"{times[0]:.1f} us, all-reduce and norm {times[1]:.1f}"
            how = "by address" if peers is not None else "by reference"
            print(f"[{rows}, {width}] over {mesh.size}, {how}: {found}; {spent}", flush=True)
        for seed in range(rounds):
            error, agree = check_chain(mesh, width, addresses, seed)
            wrong += not (agree and error < 5e-2)
            found = f"worst relative error {error:.1e}, {'the same bits' if agree else 'DIFFERENT BITS'}"
            print(f"24 sums of width {width}, seed {seed}: {found}", flush=True)
        del memory
    return wrong


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Exits with 1 if a size is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=_numbers, default=[8192, 4096])
    parser.add_argument("--rows", type=_numbers, default=[1, 2, 33, 256, 4096])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    raise SystemExit(1 if check_and_time(options.widths, options.rows, options.rounds) else 0)


if __name__ == "__main__":
    main()
