import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine.sampling import (
    NUM_COLUMNS,
    SlotParams,
    Uses,
    bad_words_rows,
    bias_row,
    needs_tables,
    stop_mask_row,
    unpack,
)
from jaxllm.errors import InvalidRequestError
from jaxllm.text.bad_words import bad_word_sequences
from tests.engine.sampling.harness import request_of
from tests.engine.sampling.reference import Row


def row(seed: int = 0, prompt: int = 3, **params) -> Row:
    return Row(np.zeros(1), SamplingParams(max_tokens=None, **params), [1] * prompt, prompt, seed=seed)


def unpacked(table: SlotParams, slots, positions):
    return unpack(jnp.asarray(table.take(slots, positions)))


def test_a_row_comes_back_as_it_went_in():
    table = SlotParams(4)
    params = dict(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, presence_penalty=-1.5, frequency_penalty=0.25)
    table.set(2, request_of(row(seed=0x0123456789ABCDEF, repetition_penalty=1.1, min_tokens=4, **params)))
    block = table.take([2, 0, -1, 2], [10, 20, 30, 40])
    assert block.shape == (4, NUM_COLUMNS) and block.dtype == np.int32
    rows = unpack(jnp.asarray(block))
    assert rows.seed.tolist() == [[0x01234567, 0x89ABCDEF], [0, 0], [0, 0], [0x01234567, 0x89ABCDEF]]
    assert rows.position.tolist() == [10, 20, 0, 40]
    for name, value in {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "presence": -1.5,
        "frequency": 0.25,
        "repetition": 1.1,
        "prompt_len": 3,
        "min_len": 7,
        "flags": Uses.PENALTIES | Uses.STOP_MASK,
    }.items():
        column = np.asarray(getattr(rows, name))
        assert column[0] == column.dtype.type(value) and column[2] == 0


def test_a_slot_forgets_its_last_request():
    table = SlotParams(1)
    table.set(0, request_of(row(seed=5, temperature=0.5, top_k=3, presence_penalty=1.0, min_tokens=3)))
    table.set(0, request_of(row(seed=6, temperature=0)))
    fresh = SlotParams(1)
    fresh.set(0, request_of(row(seed=6, temperature=0)))
    np.testing.assert_array_equal(table.take([0], [4]), fresh.take([0], [4]))


def test_taking_changes_nothing():
    table = SlotParams(2)
    table.set(0, request_of(row(seed=1)))
    before = table.take([0, 1], [0, 0])
    table.take([0, 0, 1], [7, 8, 9])[:] = -1
    np.testing.assert_array_equal(table.take([0, 1], [0, 0]), before)
    assert table.take([], []).shape == (0, NUM_COLUMNS)


@pytest.mark.parametrize(
    ("seed", "words"),
    [(-1, [2**32 - 1] * 2), (-(2**63), [2**31, 0]), (2**64 - 1, [2**32 - 1] * 2), (2**32, [1, 0]), (7, [0, 7])],
)
def test_seed_words(seed, words):
    table = SlotParams(1)
    table.set(0, request_of(row(seed=seed)))
    assert unpacked(table, [0], [0]).seed.tolist() == [words]


def test_extreme_values_stay_in_range():
    table = SlotParams(1)
    table.set(0, request_of(row(temperature=1e-300, top_k=2**62, top_p=1e-300, repetition_penalty=1e300)))
    rows = unpacked(table, [0], [0])
    assert rows.temperature[0] > 0 and np.isfinite(rows.repetition[0]) and rows.top_k[0] == 2**31 - 1
    table.set(0, request_of(row(temperature=1e300, repetition_penalty=1e-300, min_tokens=2**40)))
    rows = unpacked(table, [0], [0])
    assert np.isfinite(rows.temperature[0]) and rows.repetition[0] > 0 and rows.min_len[0] == 2**31 - 1


def test_needs_tables():
    assert needs_tables(SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)) == Uses.NOTHING
    assert needs_tables(SamplingParams(logit_bias={})) == Uses.NOTHING
    assert needs_tables(SamplingParams(logit_bias={1: 1.0})) == Uses.BIAS
    assert needs_tables(SamplingParams(allowed_token_ids=[1])) == Uses.BIAS
    assert needs_tables(SamplingParams(min_tokens=1)) == Uses.STOP_MASK
    assert needs_tables(SamplingParams(), [[1]]) == Uses.BIAS
    assert needs_tables(SamplingParams(), [[1, 2], [3]]) == Uses.BIAS | Uses.BAD_WORDS
    for penalty in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert needs_tables(SamplingParams(**{penalty: 0.5})) == Uses.PENALTIES


def test_table_rows():
    params = SamplingParams(logit_bias={1: 2.5, 4: -1.0}, allowed_token_ids=[1, 2, 3])
    bias = bias_row(params, 6, [[2], [3, 1]])
    np.testing.assert_array_equal(bias, np.array([-np.inf, 2.5, -np.inf, 0, -np.inf, -np.inf], np.float32))
    np.testing.assert_array_equal(bias_row(SamplingParams(), 3), np.zeros(3, np.float32))
    np.testing.assert_array_equal(stop_mask_row({1, 3, 99}, 5), [False, True, False, True, False])
    rows = bad_words_rows([[7], [1, 2], list(range(16))])
    assert rows.shape == (128, 16) and rows.dtype == np.int32
    assert rows[0].tolist() == [-1] * 14 + [1, 2] and rows[1].tolist() == list(range(16)) and (rows[2:] == -1).all()
    assert (bad_words_rows([[1, 2]] * 128)[:, -1] == 2).all()


@pytest.mark.parametrize(
    ("words", "limit"),
    [([[1, 2]] * 129, "128"), ([list(range(17))], "16"), ([[]], "1 to 16")],
    ids=["many", "long", "empty"],
)
def test_bad_words_beyond_the_limits_are_refused(words, limit):
    with pytest.raises(InvalidRequestError, match=limit) as error:
        bad_words_rows(words)
    assert error.value.field == "bad_words"


def test_bad_words_are_taken_with_and_without_a_space():
    vocabulary = {
        "cat": [10],
        " cat": [20],
        "dogs": [11, 12],
        " dogs": [21, 12],
        "x": [13],
        " x": [30, 13],
        "same": [5],
        " same": [5],
    }
    encode = lambda text: vocabulary[text]
    assert bad_word_sequences(["cat"], encode) == [[10], [20]]
    assert bad_word_sequences([" cat"], encode) == [[10], [20]]
    assert bad_word_sequences(["dogs", "x", "same"], encode) == [[11, 12], [21, 12], [13], [5]]
    with pytest.raises(InvalidRequestError, match=r"bad_words=130.*at most 128"):
        bad_word_sequences(["cat"] * 65, encode)
