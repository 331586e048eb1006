"""Reported log-probabilities against a direct computation of the whole sequence."""

import numpy as np
import pytest

from jaxllm import SamplingParams
from tests.engine import tiny

PROMPT = tiny.prompts(1, seed=42)[0] + tiny.prompts(1, seed=43)[0]
CHUNKED = dict(max_num_seqs=8, max_num_batched_tokens=8, token_rungs=(4, 8))
TOLERANCE = 2e-4


def assert_entries(entries, targets: list[int], expected: np.ndarray, count: int) -> None:
    """Each entry holds its target and the `count` most likely tokens, with their ranks and values."""
    assert len(entries) == len(targets) == len(expected)
    for entry, target, row in zip(entries, targets, expected, strict=True):
        order = np.argsort(-row, kind="stable")
        assert list(entry) == [target, *(token for token in order[:count].tolist() if token != target)]
        for token, found in entry.items():
            assert abs(found.logprob - row[token]) < TOLERANCE
            assert found.rank == 1 + np.sum(row > row[token])


@pytest.mark.parametrize("count", [0, 1, 20, 21, 300, -1])
def test_of_output_tokens(engine, count):
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=7, logprobs=count, presence_penalty=1.0)
    output = engine().generate(PROMPT, params)[0].outputs[0]
    expected = tiny.reference_logprobs(PROMPT + output.token_ids[:-1])[len(PROMPT) - 1 :]
    assert_entries(output.logprobs, output.token_ids, expected, tiny.VOCAB if count == -1 else count)
    chosen = [expected[i, token] for i, token in enumerate(output.token_ids)]
    assert output.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-3)
    assert next(iter(output.logprobs[0].values())).decoded_token is not None


@pytest.mark.parametrize("count", [0, 4, 21, -1])
@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["whole", "chunked"])
def test_of_prompt_tokens(engine, options, count):
    """Beside others, and though the prompt's pages are cached."""
    llm = engine(**options)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=count)
    others = [SamplingParams(temperature=0, max_tokens=6, logprobs=2) for _ in range(3)]
    prompts = tiny.prompts(3, seed=9)
    for _ in range(2):
        found = llm.generate([prompts[0], PROMPT, *prompts[1:]], [others[0], params, *others[1:]])
        assert found[1].prompt_logprobs[0] is None and len(found[1].prompt_logprobs) == len(PROMPT)
        expected = tiny.reference_logprobs(PROMPT)
        assert_entries(found[1].prompt_logprobs[1:], PROMPT[1:], expected[:-1], tiny.VOCAB if count == -1 else count)
        assert found[1].num_cached_tokens == 0
        assert found[0].prompt_logprobs is None and len(found[0].outputs[0].logprobs[0]) in (2, 3)


def test_of_prompt_and_output_of_several_samples(engine):
    params = SamplingParams(n=3, seed=1, max_tokens=4, prompt_logprobs=1, logprobs=-1)
    output = engine().generate(PROMPT, params)[0]
    assert_entries(output.prompt_logprobs[1:], PROMPT[1:], tiny.reference_logprobs(PROMPT)[:-1], 1)
    for sample in output.outputs:
        expected = tiny.reference_logprobs(PROMPT + sample.token_ids[:-1])[len(PROMPT) - 1 :]
        assert_entries(sample.logprobs, sample.token_ids, expected, tiny.VOCAB)


def test_of_a_prompt_of_one_token(engine):
    output = engine().generate([7], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))[0]
    assert output.prompt_logprobs == [None]


def test_of_a_request_that_lost_its_pages(engine):
    """Prompt logprobs come once, and are right after the prompt has been computed twice."""
    llm = engine(kv_cache_memory_bytes=34_000)
    prompts = tiny.prompts(12, seed=21, longest=8)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    before = llm.stats()["preemptions"]
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        tokens = output.outputs[0].token_ids
        expected = tiny.reference_logprobs(prompt + tokens[:-1])
        assert_entries(output.prompt_logprobs[1:], prompt[1:], expected[: len(prompt) - 1], 1)
        assert_entries(output.outputs[0].logprobs, tokens, expected[len(prompt) - 1 :], 1)
    assert llm.stats()["preemptions"] > before
