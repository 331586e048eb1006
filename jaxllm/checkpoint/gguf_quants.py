"""Dequantization of ggml's block formats in numpy.

The layouts are those of ggml's `ggml-common.h` and `dequantize_row_*` (`ggml-quants.c`). The `gguf` package has the
same in numpy, but importing it takes 0.3 s and it works on 16 rows at a time; here a chunk of blocks that fits the
second-level cache is worked on at a time, which is three times faster on a small model's tensors.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

CHUNK_ELEMENTS = 1 << 16

_FLOATS = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
}


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    np.bitwise_and(packed, 15, out=low)
    np.right_shift(packed, 4, out=high)


def _q4(blocks: np.ndarray, at: int) -> np.ndarray:
    """Sixteen bytes of nibbles from byte `at`: uint8 [blocks, 32]; low nibbles are the first sixteen values."""
    values = np.empty((len(blocks), 2, 16), np.uint8)
    _nibbles(blocks[:, at:], values[:, 0], values[:, 1])
    return values.reshape(-1, 32)


def _q5(blocks: np.ndarray, high_at: int) -> np.ndarray:
    """Thirty-two fifth bits from byte `high_at`, then nibbles: uint8 [blocks, 32]."""
    values = _q4(blocks, high_at + 4)
    bits = np.unpackbits(blocks[:, high_at : high_at + 4], axis=1, bitorder="little")
    bits <<= 4
    values |= bits
    return values


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return (_q4(blocks, 2).view(np.int8) - np.int8(8)).astype(np.float32) * _half(blocks, 0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    values = _q4(blocks, 4).astype(np.float32)
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return (_q5(blocks, 2).view(np.int8) - np.int8(16)).astype(np.float32) * _half(blocks, 0)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    values = _q5(blocks, 4).astype(np.float32)
    values *= _half(blocks, 0)
    values += _half(blocks, 2)
    return values


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _half(blocks, 0)
    return values


def _crumbs(packed: np.ndarray) -> np.ndarray:
    """Two-bit values of 64 bytes: uint8 [blocks, 2, 4, 32]; each 32 bytes hold four planes of 32 values."""
    packed = packed.reshape(-1, 2, 1, 32)
    return (packed >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)) & np.uint8(3)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales = blocks[:, :16]
    scale = (_half(blocks, 80) * (scales & 15))[:, :, None]
    minimum = (_half(blocks, 82) * (scales >> 4))[:, :, None]
    values = _crumbs(blocks[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    values *= scale
    values -= minimum
    return values


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    # twelve bytes hold sixteen 6-bit scales: eight of low nibbles, then four of high crumbs
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate([low & 15, low >> 4], axis=1)
    scales |= np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1) << np.uint8(4)
    scale = _half(blocks, 108) * (scales.view(np.int8) - np.int8(32))
    # a set bit of the mask means that 4 is *not* subtracted
    mask = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(8, 1)) & np.uint8(1)
    values = _crumbs(blocks[:, 32:96]).reshape(-1, 8, 32) | (mask << np.uint8(2))
    signed = values.view(np.int8) - np.int8(4)
    return signed.reshape(-1, 16, 16).astype(np.float32) * scale[:, :, None]


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima packed in bytes 4 to 16, times the block's own: float32 [blocks, 8, 1] each."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    minimum = np.concatenate([middle & 63, (high >> 4) | ((middle >> 2) & 48)], axis=1)
    return (_half(blocks, 0) * scale)[:, :, None], (_half(blocks, 2) * minimum)[:, :, None]


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """128 bytes of nibbles: uint8 [blocks, 8, 32]; each 32 bytes hold a plane of low, then one of high nibbles."""
    values = np.empty((len(packed), 4, 2, 32), np.uint8)
    _nibbles(packed.reshape(-1, 4, 32), values[:, :, 0], values[:, :, 1])
    return values.reshape(-1, 8, 32)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(blocks)
    values = _k_nibbles(blocks[:, 16:]).astype(np.float32)
    values *= scale
    values -= minimum
    return values


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(blocks)
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(8, 1)) & np.uint8(1)
    values = (_k_nibbles(blocks[:, 48:]) | (fifth << np.uint8(4))).astype(np.float32)
    values *= scale
    values -= minimum
    return values


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = np.empty((len(blocks), 2, 2, 64), np.uint8)
    _nibbles(blocks[:, :128].reshape(-1, 2, 64), low[:, :, 0], low[:, :, 1])
    values = low.reshape(-1, 2, 4, 32) | (_crumbs(blocks[:, 128:192]) << np.uint8(4))
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    signed = values.reshape(-1, 16, 16).view(np.int8) - np.int8(32)
    return signed.astype(np.float32) * scale[:, :, None]


# type -> (elements a block, bytes a block, blocks uint8 [n, bytes] -> float32 of n * elements)
_BLOCKS: dict[str, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}

SUPPORTED = (*_FLOATS, *_BLOCKS)


def stored_dtype(type_name: str) -> np.dtype:
    """What a tensor of this ggml type reads as: its own dtype for floats, float32 for quantized types."""
    return _FLOATS.get(type_name, np.dtype(np.float32))


def dequantize_rows(raw: np.ndarray, type_name: str, row_length: int, begin: int, end: int) -> np.ndarray:
    """Rows [begin, end) of a tensor.

    Args:
      raw: uint8 [bytes], the whole tensor.
      type_name: a ggml type of `SUPPORTED`.
      row_length: elements a row, a multiple of the type's block.

    Returns:
      [end - begin, row_length] of `stored_dtype(type_name)`; a view of `raw` for float types.
    """
    if type_name in _FLOATS:
        dtype = _FLOATS[type_name]
        width = row_length * dtype.itemsize
        return raw[begin * width : end * width].view(dtype).reshape(end - begin, row_length)
    elements, size, unpack = _BLOCKS[type_name]
    width = row_length // elements * size
    return unpack(raw[begin * width : end * width].reshape(-1, size)).reshape(end - begin, row_length)


def rows_per_chunk(row_length: int) -> int:
    """How many rows to dequantize at a time so that temporaries stay in the cache."""
    return max(1, CHUNK_ELEMENTS // max(row_length, 1))
