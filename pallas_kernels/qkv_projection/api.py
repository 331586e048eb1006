"""The signature of the projection to rotated heads, and the choice of a backend."""

import importlib

import jax

from ..qk_norm_rope import Heads

BACKENDS = ("reference", "tpu")


def has_kernel(
    x: jax.Array,
    weight: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    heads: Heads,
    backend: str,
    *,
    of_decodes: bool = False,
) -> bool:
    """Whether `backend` has a kernel for these shapes that is worth it; "reference" takes all. of_decodes: x has a row
    for each of a step's requests."""
    if backend == "tpu":
        from . import tpu  # Pallas takes time to import

        return tpu.gains(of_decodes=of_decodes) and tpu.supports(x, weight, tables, heads)
    return backend == "reference"


def qkv_projection(
    x: jax.Array,
    weight: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    norms: tuple[jax.Array, jax.Array] | None,
    heads: Heads,
    *,
    backend: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qk_norm_rope` of x @ weight, rounded to x's dtype between the two.

    Args:
      x: [T, K].
      weight: [K, heads.width], as a row of what it makes is divided: queries, keys, values.
      tables, norms: as `qk_norm_rope` takes them.
      backend: one of BACKENDS.

    Returns:
      queries [T, heads.queries, dim], keys and values [T, heads.keys, dim], in x's dtype.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    if x.ndim != 2 or weight.shape != (x.shape[1], heads.width) or any(len(table) != len(x) for table in tables):
        raise ValueError(
            f"x {x.shape} must be [T, K], weight {weight.shape} [K, {heads.width}] and tables {tables[0].shape} [T, R]"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{backend}", __package__)
    return module.qkv_projection(x, weight, tables, norms, heads)
