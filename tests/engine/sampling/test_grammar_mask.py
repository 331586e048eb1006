import jax
import numpy as np
import pytest

from jaxllm.engine.sampling import RowParams, Uses, apply_grammar_mask, mask_words

VOCAB, SLOTS, ROWS = 301, 9, 5


@pytest.mark.parametrize(("offset", "width"), [(0, 301), (0, 320), (77, 100), (288, 32)])
def test_tokens_of_set_bits_stay_and_the_others_go(offset, width):
    rng = np.random.default_rng(0)
    bits = rng.random((SLOTS, 32 * mask_words(VOCAB))) < 0.5
    bits[:, VOCAB:] = False
    masks = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    logits = rng.normal(size=(ROWS, width)).astype(np.float32)
    logits[1, 3], logits[2, 4] = np.nan, np.inf
    slots = np.array([3, 8, 0, 3, 5], np.int32)
    flags = np.array([Uses.GRAMMAR, Uses.GRAMMAR | Uses.BIAS, Uses.GRAMMAR, 0, Uses.PENALTIES], np.int32)
    fields = {name: np.zeros(ROWS, np.int32) for name in RowParams.__dataclass_fields__}
    rows = RowParams(**fields | {"flags": flags})
    found = np.asarray(jax.jit(apply_grammar_mask)(logits, rows, masks, slots, offset))
    for row in range(ROWS):
        for column in range(width):
            token = offset + column
            forbidden = flags[row] & Uses.GRAMMAR and not (token < VOCAB and bits[slots[row], token])
            if forbidden and logits[row, column] < np.inf:
                assert found[row, column] == -np.inf
            else:
                np.testing.assert_equal(found[row, column], logits[row, column])
