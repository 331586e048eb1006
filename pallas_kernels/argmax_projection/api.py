"""The signature of the projection to a row's largest entry, and the choice of a backend."""

import importlib

import jax

BACKENDS = ("reference", "tpu")


def has_kernel(x: jax.Array, weight: jax.Array, backend: str, *, by_columns: bool) -> bool:
    """Whether `backend` has a kernel for these shapes that is worth it; "reference" takes all, and is worth nothing."""
    if backend != "tpu":
        return False
    from . import tpu  # Pallas takes time to import

    return tpu.supports(x, weight, by_columns=by_columns)


def argmax_projection(
    x: jax.Array,
    weight: jax.Array,
    num_valid: jax.Array | int,
    *,
    by_columns: bool,
    cap: float | None = None,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
    """The largest entry of each row of x @ weight, in float32, and the first column that holds it.

    Args:
      x: [T, K].
      weight: [K, N], or [N, K] if `by_columns`, as a table of embeddings lies.
      num_valid: int32[], columns beyond so many count as -inf.
      cap: entries are cap * tanh(entry / cap) (Gemma 2's soft cap); None: as they are.
      backend: one of BACKENDS.

    Returns:
      float32[T], infinity where any valid entry is NaN or infinity; int32[T], any column where the largest is not
      finite.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1 if by_columns else 0] != x.shape[1]:
        raise ValueError(f"x {x.shape} must be [T, K] and weight {weight.shape} {'[N, K]' if by_columns else '[K, N]'}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{backend}", __package__)
    return module.argmax_projection(x, weight, num_valid, by_columns=by_columns, cap=cap)
