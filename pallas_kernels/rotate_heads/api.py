"""The signature of the rotation of heads, and the choice of a backend."""

import importlib

import jax

BACKENDS = ("reference", "gpu")


def has_kernel(
    num_tokens: int, num_heads: int, head_dim: int, rotated: int, dtype: jax.typing.DTypeLike, backend: str
) -> bool:
    """Whether `backend` has a kernel that gains something for so many tokens and heads of this size, whose first
    `rotated` dims turn; "reference" takes all."""
    if backend != "gpu":
        return backend == "reference"
    from . import gpu  # Pallas takes time to import

    return num_tokens >= gpu.MIN_TOKENS and gpu.supports(num_heads, head_dim, rotated, dtype)


def rotate_heads(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    queries: int,
    keys: int,
    norms: tuple[jax.Array, jax.Array] | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    backend: str,
) -> jax.Array:
    """Normalizes the queries and keys of each token, where the family does, and rotates them (Su et al., 2021).

    Args:
      x: [T, queries + keys + others, head_dim]; the others pass.
      cos, sin: float32[T, R / 2] of the first R dims of each head, in Hugging Face's half-rotated order.
      norms: the weights of the queries' and the keys' root mean square norm, [head_dim] each.
      eps, unit_offset: of the norms, see `add_rms_norm`.
      backend: one of BACKENDS.

    Returns:
      an array like x.

    Raises:
      ValueError: shapes that do not fit, or what the backend lacks.
    """
    if x.ndim != 3 or cos.shape != sin.shape or cos.shape[0] != x.shape[0] or queries + keys > x.shape[1]:
        expected = f"[T, {queries} + {keys} heads or more, head_dim]"
        raise ValueError(f"x {x.shape} must be {expected}, cos {cos.shape} and sin {sin.shape} [T, R]")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    module = importlib.import_module(f".{backend}", __package__)
    return module.rotate_heads(x, cos, sin, queries=queries, keys=keys, norms=norms, eps=eps, unit_offset=unit_offset)
