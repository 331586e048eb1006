"""The signature of the residual sum and norm, and the choice of a backend."""

import importlib

import jax

BACKENDS = ("reference", "gpu")


def has_kernel(width: int, dtype, backend: str) -> bool:
    """Whether `backend` normalizes rows of this width and dtype; "reference" takes all."""
    if backend != "gpu":
        return backend == "reference"
    from . import gpu  # Pallas takes time to import

    return gpu.supports(width, dtype)


def add_rms_norm(
    x: jax.Array, update: jax.Array, weight: jax.Array, *, eps: float, unit_offset: bool = False, backend: str
) -> tuple[jax.Array, jax.Array]:
    """Adds to the residual stream and normalizes the sum (Zhang and Sennrich, 2019), in float32.

    Args:
      x, update: [T, H].
      weight: [H].
      eps: added to the mean square.
      unit_offset: the weight is stored less one and multiplied before rounding (Gemma); otherwise after.
      backend: one of BACKENDS.

    Returns:
      (x + update, its norm), both [T, H] in x's dtype.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    if x.ndim != 2 or update.shape != x.shape or weight.shape != x.shape[1:]:
        raise ValueError(f"x {x.shape} and update {update.shape} must be [T, H], and weight {weight.shape} [H]")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{backend}", __package__)
    return module.add_rms_norm(x, update, weight, eps=eps, unit_offset=unit_offset)
