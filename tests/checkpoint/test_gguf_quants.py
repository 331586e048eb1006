import gguf
import numpy as np
import pytest

from jaxllm.checkpoint import gguf_quants
from jaxllm.checkpoint.gguf_format import GGML_TYPES

QUANTIZED = [name for name in gguf_quants.SUPPORTED if name not in ("F32", "F16", "BF16", "F64")]


def random_blocks(name: str, rows: int, row_length: int, seed: int) -> np.ndarray:
    """Random bytes with finite float16 scales: every bit pattern of the packed part."""
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows * row_length // elements, size), dtype=np.uint8)
    halves = {"Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}
    for at in halves.get(name, [0, 2]):
        blocks[:, at + 1] &= 0xBF  # clears the exponent's top bit
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("seed", range(3))
def test_equals_gguf_package(name, seed):
    rows, row_length = 7, 512
    stored = random_blocks(name, rows, row_length, seed)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    values = gguf_quants.dequantize_rows(stored.ravel(), name, row_length, 0, rows)
    assert values.dtype == np.float32 and values.shape == (rows, row_length)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(
        gguf_quants.dequantize_rows(stored.ravel(), name, row_length, 2, 5), expected[2:5], "a range of rows"
    )


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_values_come_back_close(name):
    original = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    stored = gguf.quants.quantize(original, gguf.GGMLQuantizationType[name])
    values = gguf_quants.dequantize_rows(stored.ravel(), name, 256, 0, 16)
    steps = {"Q4_0": 16, "Q4_1": 15, "Q5_0": 32, "Q5_1": 31, "Q8_0": 254}[name]
    assert np.abs(values - original).max() < 2 * np.abs(original).max() / steps


def test_block_sizes_are_those_of_gguf():
    for number, (name, elements, size) in GGML_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (elements, size), name
