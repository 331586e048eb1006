"""The signature of the residual sum and norm, and the choice of a backend."""

import importlib

import jax
import jax.numpy as jnp

BACKENDS = ("reference", "gpu")


def has_kernel(width: int, dtype, backend: str) -> bool:
    """Whether `backend` normalizes rows of this width and dtype; "reference" takes all."""
    if backend != "gpu":
        return backend == "reference"
    from . import gpu  # Pallas takes time to import

    return gpu.supports(width, dtype)


def product(x: jax.Array, weight: jax.Array, backend: str) -> jax.Array:
    """x [T, D] by weight [D, H] as `add_rms_norm` had best be given it: [T, H] in x's dtype, or float32[parts, T, H],
    each of a run of the depth, where `backend` has a kernel that sums them."""
    (rows, depth), width, parts = x.shape, weight.shape[1], 1
    if backend == "gpu" and has_kernel(width, x.dtype, backend):
        from . import gpu

        parts = gpu.parts(rows, depth, width)
    if parts == 1:
        return jnp.dot(x, weight)
    runs, weights = x.reshape(rows, parts, -1), weight.reshape(parts, -1, width)
    return jnp.einsum("tpd,pdh->pth", runs, weights, preferred_element_type=jnp.float32)


def add_rms_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, *, eps: float, unit_offset: bool = False, backend: str
) -> tuple[jax.Array, jax.Array]:
    """Adds to the residual stream and normalizes the sum (Zhang and Sennrich, 2019), in float32.

    Args:
      x: [T, H].
      update: [T, H], or float32[P, T, H], the sum of which it is.
      weight: [H].
      eps: added to the mean square.
      unit_offset: the weight is stored less one and multiplied before rounding (Gemma); otherwise after.
      backend: one of BACKENDS.

    Returns:
      (x + update, its norm), both [T, H] in x's dtype.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    fits = update.shape == x.shape or (update.shape[1:] == x.shape and update.dtype == jnp.float32)
    if x.ndim != 2 or not fits or weight.shape != x.shape[1:]:
        raise ValueError(
            f"x {x.shape} and update {update.shape} must be [T, H], or update float32[P, T, H], and weight "
            f"{weight.shape} [H]"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{backend}", __package__)
    return module.add_rms_norm(x, update, weight, eps=eps, unit_offset=unit_offset)
