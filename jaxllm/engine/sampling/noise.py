"""Randomness that is a function of (seed, position, purpose, vocabulary id) and of nothing else."""

import enum

import jax
import jax.numpy as jnp
import numpy as np

_POSITION_BITS = 28


class Purpose(enum.IntEnum):
    """What a draw is for: draws for different purposes at one position are independent. At most 16 members."""

    SAMPLE = 0


def threefry2x32(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011); the bits of jax.extend.random.threefry2x32_p.

    Written out in array operations because the primitive does not fuse: on CPU it is 25 times slower, and on GPU it is
    a custom call that reads and writes six arrays.

    Args:
      key, counter: pairs of uint32 arrays that broadcast together.

    Returns:
      Two uint32 arrays of the broadcast shape.
    """
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    x0, x1 = counter[0] + k0, counter[1] + k1
    for group in range(5):
        for rotation in rotations[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << rotation) | (x1 >> (32 - rotation))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def gumbel(seed: jax.Array, position: jax.Array, ids: jax.Array, purpose: Purpose = Purpose.SAMPLE) -> jax.Array:
    """Standard Gumbel noise for each row and vocabulary id.

    Args:
      seed: uint32[R, 2], high word first.
      position: int32[R], below 2**28.
      ids: int32[V] or [R, V], global vocabulary ids.
      purpose: what the draw is for.

    Returns:
      float32[R, V] in [-2.82, 22.9]; the upper tail, which decides, keeps a resolution of 2**-33 in probability.
    """
    first = position.astype(jnp.uint32) | np.uint32(purpose << _POSITION_BITS)
    counter = (first[:, None], jnp.atleast_2d(ids).astype(jnp.uint32))
    bits, _ = threefry2x32((seed[:, :1], seed[:, 1:]), counter)
    # 1 - u instead of u: float32 is fine near 0, where the exponential that wins the race lies, and coarse near 1.
    uniform = (bits.astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-32)
    uniform = jnp.minimum(uniform, np.float32(1 - 2**-24))
    return -jnp.log(-jnp.log1p(-uniform))
