"""The copy bandwidth and the GEMM rate of this process's device, measured."""

import time
from collections.abc import Callable

from jaxllm.bench.floor import Ceilings


def measure_ceilings(itemsize: int = 2) -> Ceilings:
    """Best of several of a copy and a square GEMM of normal values, bfloat16 for itemsize 2 and float32 for 4.

    Takes 2.1 GB of an accelerator, 0.5 GB of a CPU, and gives it back. On a CPU the bandwidth is that of a float32
    matrix times a vector, a plain reading of memory: what decoding does there, where a copy's writes cost extra.
    """
    import jax
    import jax.numpy as jnp

    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if itemsize == 4 else jnp.bfloat16
    size = 2048 if on_cpu else 8192

    def best(run: Callable[[], jax.Array], repeats: int, inner: int) -> float:
        run().block_until_ready()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            results = [run() for _ in range(inner)]
            results[-1].block_until_ready()
            times.append((time.perf_counter() - begin) / inner)
        return min(times)

    ones = jax.jit(lambda rows, cols: jnp.ones((rows, cols), dtype), static_argnums=(0, 1))
    if on_cpu:
        matrix, vector = ones(16384, 8192), ones(8192, 1)
        product = jax.jit(lambda a, x: a @ x)
        bandwidth = matrix.nbytes / best(lambda: product(matrix, vector), 5, 2)
        del matrix, vector
    else:
        source = ones(65536, 8192)
        copy = jax.jit(lambda x: x + 1)
        bandwidth = 2 * source.nbytes / best(lambda: copy(source), 5, 4)
        del source
    # A GPU draws less power, and so keeps a higher clock, on operands that are all the same.
    normal = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (size, size), dtype))
    left, right = normal(0), normal(1)
    multiply = jax.jit(lambda a, b: a @ b)
    flops = 2 * size**3 / best(lambda: multiply(left, right), 5, 1 if on_cpu else 10)
    return Ceilings(bandwidth, flops)
