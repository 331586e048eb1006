"""What Mosaic TPU kernels share: whether arrays stay in VMEM on their way from one kernel or product to the next.

XLA:TPU keeps whole arrays in VMEM where it finds room, but gives fetching weights early precedence: those come once in
any case, while an array that makes room for them goes to HBM and back.
"""

import jax
from jax.experimental.pallas import tpu as pltpu


def keep_in_vmem(x: jax.Array, most_bytes: int, interpret) -> jax.Array:
    """An operand of a kernel, in VMEM if it has no more than `most_bytes`."""
    return x if interpret or x.nbytes > most_bytes else pltpu.with_memory_space_constraint(x, pltpu.VMEM)


def result(shape: tuple[int, ...], dtype, most_bytes: int, interpret):
    """The shape of a kernel's result, in VMEM if it has no more than `most_bytes`."""
    kept = jax.ShapeDtypeStruct(shape, dtype)
    return kept if interpret or kept.size * kept.dtype.itemsize > most_bytes else pltpu.VMEM(shape, dtype)
