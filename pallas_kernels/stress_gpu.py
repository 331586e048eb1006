"""Checks every GPU kernel on the device, against float32, on fresh random inputs:

    python -m pallas_kernels.stress_gpu [--seconds 60] [--processes 8]

Interpreters run wgmma at once, so that they miss a wait that is missing; only the device shows it. Attention is checked
by `ragged_paged_attention.stress_gpu`, whose kinds of batch are dealt to the processes, then come the kernels below,
and where there are several GPUs `all_reduce_rms_norm.stress_gpu`. The kernels below go through their shapes in turn
until the time is over, each of them once at least: outputs are likely to lie where NaN was before, an input's last rows
are NaN in every other round, and calls are repeated, with other work between them, and must give the same bits.
"""

import argparse
import dataclasses
import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .add_rms_norm import gpu as add_rms_norm
from .add_rms_norm import reference as add_rms_norm_reference
from .all_reduce_rms_norm import stress_gpu as all_reduce_rms_norm
from .gated_matmul import gpu as gated_matmul
from .gated_matmul import reference as gated_matmul_reference
from .qk_norm_rope import Heads
from .qk_norm_rope import gpu as qk_norm_rope
from .qk_norm_rope import reference as qk_norm_rope_reference

TOLERANCE = 1e-2  # of the norm of a row: two steps of bfloat16
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    Attributes:
      name: of the kernel and its shape.
      kernel: (*inputs) -> an array or several, rows along their first axis, on the device.
      truth: the same in float32.
      inputs: draws them; the first has the rows, in bfloat16.
    """

    name: str
    kernel: Callable[..., Any]
    truth: Callable[..., Any]
    inputs: Callable[[np.random.Generator], tuple[Any, ...]]


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray((scale * rng.standard_normal(shape, np.float32)).astype(dtype))


def gated(shapes: Iterable[tuple[int, int, int]], **options: Any) -> Iterator[Case]:
    """(rows, depth, columns) of the gated projection, with both activations."""
    for rows, depth, columns in shapes:
        for activation in ("silu", "gelu_tanh"):
            settings: Any = dict(activation=activation)

            def inputs(rng, rows=rows, depth=depth, columns=columns):
                return _normal(rng, rows, depth), _normal(rng, depth, 2 * columns, scale=depth**-0.5)

            yield Case(
                f"gated_matmul {activation} [{rows}, {depth}] by [{depth}, 2 × {columns}]",
                functools.partial(gated_matmul.gated_matmul, **settings, **options),
                functools.partial(gated_matmul_reference.gated_matmul, **settings),
                inputs,
            )


def norms(shapes: Iterable[tuple[int, int, int]], **options: Any) -> Iterator[Case]:
    """(rows, width, parts of the update; 0: bfloat16, whole) of the residual sum and norm."""
    for rows, width, parts in shapes:
        for unit_offset in (False, True):
            settings: Any = dict(eps=EPS, unit_offset=unit_offset)

            def inputs(rng, rows=rows, width=width, parts=parts):
                x, weight = _normal(rng, rows, width), _normal(rng, width)
                update = _normal(rng, parts, rows, width, dtype=np.float32) if parts else _normal(rng, rows, width)
                return x, update, weight

            yield Case(
                f"add_rms_norm {unit_offset=} [{rows}, {width}] in {parts} parts",
                functools.partial(add_rms_norm.add_rms_norm, **settings, **options),
                functools.partial(add_rms_norm_reference.add_rms_norm, **settings),
                inputs,
            )


def rotations(shapes: Iterable[tuple[int, Heads]], **options: Any) -> Iterator[Case]:
    """(rows, heads) of norm and rotation, without norms and with."""
    for rows, heads in shapes:
        for normed in (False, True):
            settings: Any = dict(heads=heads)

            def inputs(rng, rows=rows, heads=heads, normed=normed):
                angles = rng.random((rows, heads.dim // 2), np.float32) * 6
                weights = (_normal(rng, heads.dim), _normal(rng, heads.dim)) if normed else None
                return _normal(rng, rows, heads.width), (jnp.cos(angles), jnp.sin(angles)), weights

            yield Case(
                f"qk_norm_rope {normed=} [{rows}] {heads}",
                functools.partial(qk_norm_rope.qk_norm_rope, **settings, **options),
                functools.partial(qk_norm_rope_reference.qk_norm_rope, **settings),
                inputs,
            )


# What the engine gives them: Llama 3.1 8B and 3.3 70B, Qwen3 0.6B, Gemma, Llama 3.2; few rows and many.
DEVICE_CASES = (
    *gated([(256, 4096, 14336), (1024, 4096, 14336), (2048, 8192, 7168), (512, 1024, 3072), (8192, 1024, 3072)]),
    *norms([(1, 4096, 0), (2, 4096, 4), (256, 4096, 2), (64, 1024, 4), (256, 8192, 0), (4096, 4096, 0), (33, 2304, 0)]),
    *rotations(
        (rows, Heads(*heads, eps=EPS, unit_offset=heads[2] == 256))
        for heads in ((32, 8, 128), (16, 8, 128), (16, 8, 256), (32, 8, 64), (24, 8, 128))
        for rows in (1, 257, 2048)
    ),
)


def _error(found: Iterable[jax.Array], expected: Iterable[jax.Array]) -> float:
    """The worst of a row's norm of the difference over the expected one's; NaN where either has one."""
    worst = 0.0
    for pair in zip(found, expected, strict=True):
        one, other = (np.asarray(array, np.float32).reshape(len(array), -1) for array in pair)
        norm = np.linalg.norm(other, axis=1)
        worst = float(np.maximum(worst, (np.linalg.norm(one - other, axis=1) / np.where(norm, norm, 1)).max()))
    return worst


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(jnp.float32), tree)


def _poison(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> None:
    """Leaves NaN where the next arrays of these shapes are likely to be put."""
    jax.block_until_ready([jnp.full(shape, jnp.nan, dtype) for shape, dtype in shapes])


def check_case(case: Case, rng: np.random.Generator, rounds: int, repeats: int = 3) -> tuple[float, bool]:
    """The worst relative error of a row, and whether repetitions gave the same bits, over so many rounds."""
    kernel, truth = (jax.jit(lambda *args, run=run: jax.tree.leaves(run(*args))) for run in (case.kernel, case.truth))
    work, worst, same = jax.jit(lambda x: x @ x.T), 0.0, True
    for turn in range(rounds):
        first, *rest = case.inputs(rng)
        good = len(first) - (len(first) // 3 if turn % 2 else 0)  # rows, none of which may depend on those behind them
        first = first.at[good:].set(jnp.nan)
        expected = truth(*_wide((first, *rest)))
        _poison([(array.shape, array.dtype) for array in jax.eval_shape(kernel, first, *rest)])
        found = kernel(first, *rest)
        error = _error([array[:good] for array in found], [array[:good] for array in expected])
        worst = float(np.maximum(worst, error))
        for _ in range(repeats):
            work(first)  # other work on the device's multiprocessors meanwhile
            again = kernel(first, *rest)
            same &= all(np.array_equal(_bits(one), _bits(other)) for one, other in zip(found, again, strict=True))
    return worst, same


def _bits(array: jax.Array) -> np.ndarray:
    return np.asarray(jax.lax.bitcast_convert_type(array, jnp.uint16))


def check(cases: Sequence[Case], seconds: float) -> int:
    """Goes through the cases until the time is up, each once at least; prints a line for each, returns how many were
    wrong."""
    rng, wrong, end = np.random.default_rng(time.time_ns()), 0, time.time() + seconds
    for count, case in enumerate(itertools.cycle(cases)):
        if count >= len(cases) and time.time() > end:
            return wrong
        error, same = check_case(case, rng, rounds=4)
        good = error < TOLERANCE and same
        wrong += not good
        if not good or count < len(cases):
            told = f"{case.name}: worst relative error {error:.1e}, {'the same bits' if same else 'DIFFERENT BITS'}"
            print(told + ("" if good else " WRONG"), flush=True)
    return wrong


def main() -> None:
    """Exits with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for attention, and for the others together")
    parser.add_argument("--processes", type=int, default=8, help="that check attention beside each other")
    options = parser.parse_args()
    attention = [sys.executable, "-m", f"{__package__}.ragged_paged_attention.stress_gpu", "check"]
    attention += ["--seconds", str(options.seconds), "--processes", str(options.processes)]
    wrong = int(subprocess.run(attention).returncode != 0)  # before this process takes the device's memory
    wrong += check(DEVICE_CASES, options.seconds)
    if len(jax.devices()) > 1:
        wrong += all_reduce_rms_norm.check_and_time()
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
