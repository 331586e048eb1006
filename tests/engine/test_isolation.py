"""A request's fault is the request's: what is broken in one touches no other."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.errors import InvalidRequestError
from tests.engine import tiny


@pytest.fixture
def own(checkpoint, request):
    """An engine that may be broken."""
    with tiny.llm(checkpoint(getattr(request, "param", "llama"))) as llm:
        yield llm
    gc.collect()


def runner_of(llm: LLM):
    return llm._client._core.runner  # type: ignore[attr-defined]


def poison_token(llm: LLM, token: int) -> None:
    """Whoever holds this token gets NaN for hidden rows from there on."""
    runner = runner_of(llm)
    leaves = [np.asarray(leaf) for leaf in runner.device.leaves]
    at = next(i for i, leaf in enumerate(leaves) if leaf.shape == (tiny.VOCAB, tiny.HIDDEN))
    leaves[at] = leaves[at].copy()
    leaves[at][token] = np.nan
    runner.device.replace_weights(
        [jax.device_put(new, old.sharding) for new, old in zip(leaves, runner.device.leaves, strict=True)]
    )


def test_nan_logits_end_their_request_alone(own, truth):
    work, alone = truth("llama")
    used = {t for prompt, _ in work for t in prompt} | {t for o in alone for t in o.outputs[0].token_ids}
    bad = next(token for token in range(tiny.FIRST_BYTE, tiny.VOCAB) if token not in used)
    poison_token(own, bad)
    prompts, params = [prompt for prompt, _ in work[:24]], [p for _, p in work[:24]]
    for at in (3, 11, 19):  # greedy, seeded, with tables; NaN comes from the prompt's start or from its end
        prompts[at] = [bad, *prompts[at]] if at % 2 else [*prompts[at], bad]
    outputs = own.generate(prompts, params)
    for i, output in enumerate(outputs):
        sample = output.outputs[0]
        if i in (3, 11, 19):
            assert (sample.token_ids, sample.finish_reason) == ([], "error")
        else:
            assert sample.token_ids == alone[i].outputs[0].token_ids, i
    stats = own.stats()
    assert stats["running"] == stats["waiting"] == stats["cache_usage"] == 0


def test_nan_in_the_middle_of_a_stream(own):
    prompt, greedy = tiny.prompts(1, seed=1)[0], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = own.generate(prompt, greedy)[0].outputs[0].token_ids
    bad = next(token for token in range(100, 200) if token not in expected)
    poison_token(own, bad)
    biased = SamplingParams(temperature=0, max_tokens=10, logit_bias={bad: 100.0})
    broken, fine = own.stream(prompt[:5], biased), own.stream(prompt, greedy)
    assert [token for delta in fine for token in delta.token_ids] == expected
    deltas = list(broken)
    assert [token for delta in deltas for token in delta.token_ids] == [bad]
    assert deltas[-1].finish_reason == "error" and "NaN" in (deltas[-1].error or "")


def test_a_request_without_any_token_left_ends_with_an_error(own):
    (word,) = own.get_tokenizer().encode("a", add_special_tokens=False)
    nothing = SamplingParams(temperature=0, allowed_token_ids=[word], bad_words=["a"])
    fine = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    broken, other = own.generate([[5, 6], [5, 6]], [nothing, fine])
    assert (broken.outputs[0].finish_reason, broken.outputs[0].token_ids) == ("error", [])
    assert len(other.outputs[0].token_ids) == 5
    with pytest.raises(InvalidRequestError, match="allowed_token_ids"):  # what can be seen at the door ends there
        own.generate([5, 6], SamplingParams(allowed_token_ids=[tiny.EOS], min_tokens=3))


@pytest.mark.parametrize("own", ["llama", "mistral", "gemma2"], indirect=True)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_foreign_pages_and_the_dummy_page_may_hold_anything(own, value):
    """Long enough that windows have moved on and pages behind them have been given back."""
    runner, cache = runner_of(own), own._client._core.schedulers[0].kv_cache
    prompts = [tiny.prompts(1, seed=seed)[0] for seed in (1, 2, 3)]
    params = [SamplingParams(temperature=t, seed=7, max_tokens=40, ignore_eos=True) for t in (0, 0.8, 0)]
    expected = [own.generate(p, q, cache_salt="before")[0].outputs[0].token_ids for p, q in zip(prompts, params)]
    layers = runner.plan.layers

    def poison() -> None:
        jax.block_until_ready(runner.device.caches)
        poisoned = []
        for layer, array in zip(layers, runner.device.caches, strict=True):
            pool = cache.pools[layer.group]
            foreign = np.asarray([count == 0 for count in pool.refs])
            assert foreign[0] and array.shape[0] == len(foreign) and foreign.sum() > len(foreign) // 2
            host = np.array(array)
            host[foreign] = value
            poisoned.append(jax.device_put(host, array.sharding))
        runner.device.caches = poisoned

    own.reset_prefix_cache()
    poison()
    streams = [own.stream(prompt, asked) for prompt, asked in zip(prompts, params, strict=True)]
    found: list[list[int]] = [[] for _ in streams]
    for turn in range(6):
        for stream, tokens in zip(streams, found, strict=True):
            tokens += [token for _, delta in zip(range(5), stream, strict=False) for token in delta.token_ids]
        own.reset_prefix_cache()  # what is cached is about to be destroyed
        poison()
    for stream, tokens in zip(streams, found, strict=True):
        tokens += [token for delta in stream for token in delta.token_ids]
    assert found == expected


def test_poison_is_seen_where_it_should_be(own):
    """The test above bites: a request's own pages do matter."""
    stream = own.stream([5, 6, 7], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    next(stream)
    runner = runner_of(own)
    runner.device.caches = [jnp.full_like(array, jnp.nan) for array in runner.device.caches]
    assert list(stream)[-1].finish_reason == "error"
