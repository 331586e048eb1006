"""Seeds of the samples of one request."""

_MASK64 = 2**64 - 1


def _mix64(value: int) -> int:
    """The splitmix64 step (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def derive_seed(seed: int, sample_index: int) -> int:
    """The 64-bit unsigned seed of sample `sample_index` of a request (`n > 1`).

    Index 0 keeps the seed itself, so that the first of n samples is what n = 1 would have given; the others are a
    64-bit mix of both, distinct for one seed. A negative seed counts modulo 2**64.
    """
    seed &= _MASK64
    return seed if sample_index == 0 else _mix64(_mix64(seed) ^ sample_index)
