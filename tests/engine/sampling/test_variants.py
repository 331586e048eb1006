import itertools

import pytest

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.engine.sampling import (
    EVERYTHING,
    FILTERS,
    GREEDY,
    MAX_LOGPROBS,
    RANDOM,
    VARIANTS,
    SamplerVariant,
    cover,
    is_wide,
    variant_for,
)


@pytest.mark.parametrize(
    ("params", "variant"),
    [
        ({"temperature": 0}, GREEDY),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, GREEDY),
        ({}, RANDOM),
        ({"top_k": 5}, FILTERS),
        ({"top_p": 0.5}, FILTERS),
        ({"min_p": 0.5}, FILTERS),
        ({"temperature": 0, "presence_penalty": 0.1}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "frequency_penalty": 0.1}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "repetition_penalty": 1.1}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "logit_bias": {1: 1.0}}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "allowed_token_ids": [1]}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "bad_words": ["no"]}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "min_tokens": 1}, SamplerVariant(adjust=True)),
        ({"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="a")}, SamplerVariant(masked=True)),
        ({"temperature": 0, "logprobs": 0}, SamplerVariant(num_logprobs=MAX_LOGPROBS)),
        ({"temperature": 0, "logprobs": 20}, SamplerVariant(num_logprobs=MAX_LOGPROBS)),
        ({"temperature": 0, "logprobs": 21}, GREEDY),
        ({"temperature": 0, "logprobs": -1}, GREEDY),
    ],
    ids=str,
)
def test_variant_for_one(params, variant):
    assert variant_for([SamplingParams(**params)]) == variant


def test_variant_for_a_batch_is_the_union():
    batch = [SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams(temperature=0, logprobs=2)]
    assert variant_for(batch) == SamplerVariant(random=True, filters=True, num_logprobs=MAX_LOGPROBS)
    assert variant_for([]) == GREEDY


def test_the_ladder_covers_everything_and_itself():
    for *flags, masked in itertools.product([False, True], repeat=4):
        for num_logprobs in (None, MAX_LOGPROBS):
            need = SamplerVariant(*flags, num_logprobs, masked)
            assert cover(need).serves(need) and cover(need).masked == masked
    for variant in VARIANTS:
        assert cover(variant) == variant
    assert not cover(SamplerVariant(random=True, masked=True)).filters  # its neighbours would pay for it
    assert [v.cost for v in VARIANTS] == sorted(v.cost for v in VARIANTS)
    assert cover(GREEDY, [EVERYTHING, FILTERS]) == FILTERS
    with pytest.raises(LookupError):
        cover(EVERYTHING, [GREEDY, RANDOM])


def test_is_wide():
    assert [is_wide(n) for n in (None, 0, 20, 21, -1)] == [False, False, False, True, True]
