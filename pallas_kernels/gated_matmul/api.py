"""The signature of the gated projection, and the choice of a backend."""

import importlib

import jax

BACKENDS = ("reference", "gpu", "tpu")


def has_kernel(x: jax.Array, weight: jax.Array, activation: str, backend: str, *, of_decodes: bool = False) -> bool:
    """Whether `backend` has a kernel for these shapes that is worth it; "reference" takes all. of_decodes: x has a row
    for each of a step's requests."""
    if backend == "gpu":
        from . import gpu  # Pallas takes time to import

        return gpu.supports(x, weight, activation, gpu.tuned())
    if backend == "tpu":
        from . import tpu

        return not (of_decodes and tpu.keeps_decodes()) and tpu.supports(x, weight, activation)
    return backend == "reference"


def gated_matmul(x: jax.Array, weight: jax.Array, *, activation: str, backend: str) -> jax.Array:
    """act(x @ gate) * (x @ up), gate and up being the halves of one weight (Shazeer, 2020).

    Args:
      x: [T, K].
      weight: [K, 2 N], the gate's N columns before up's.
      activation: a name of ACTIVATIONS.
      backend: one of BACKENDS.

    Returns:
      [T, N] in x's dtype.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] % 2:
        raise ValueError(f"x {x.shape} must be [T, K] and weight {weight.shape} [K, 2 N]")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    return importlib.import_module(f".{backend}", __package__).gated_matmul(x, weight, activation=activation)
