"""After warm-up no request meets a compilation, whatever it asks of the sampler."""

import itertools
import logging

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from tests.engine import tiny

ASKS: list[dict] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.1},
    {"presence_penalty": 1.0},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.2},
    {"logit_bias": {5: 3.0}},
    {"allowed_token_ids": [5, 6, 7, 200]},
    {"bad_words": ["a", "the ring"]},
    {"min_tokens": 2, "stop_token_ids": [5]},
    {"logprobs": 0},
    {"logprobs": 20},
    {"stop": ["th"]},
    {"stop_token_ids": [9, 10]},
    {"include_stop_str_in_output": True},
    {"ignore_eos": True},
    {"skip_special_tokens": False},
    {"detokenize": True},
    {"n": 3},
    {"structured_outputs": StructuredOutputsParams(regex="[a-z]+")},
    {"seed": 2**64 - 1},
]


class Compilations:
    """Counts what JAX traces, lowers or compiles (from the persistent cache too) while it is on."""

    def __init__(self):
        self.on, self.seen = False, []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: object) -> None:
        if self.on and event.startswith("/jax/core/compile/"):
            self.seen.append(event)

    def __enter__(self) -> "Compilations":
        self.on, self.seen = True, []
        return self

    def __exit__(self, *_: object) -> None:
        self.on = False


@pytest.fixture(scope="module")
def compilations():
    return Compilations()


@pytest.fixture(scope="module")
def warm(checkpoint):
    with tiny.llm(checkpoint("llama"), max_num_seqs=8, max_num_batched_tokens=32, token_rungs=(4, 32)) as llm:
        assert llm.warm_up() > 15
        yield llm


def test_the_counter_counts(compilations):
    with compilations:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7, jnp.int16))
    assert "/jax/core/compile/backend_compile_duration" in compilations.seen


def test_all_pairs_of_parameters(warm, compilations):
    work = []
    for index, (one, other) in enumerate(itertools.combinations_with_replacement(ASKS, 2)):
        asked = {"max_tokens": 3, "seed": index} | one | other
        work.append((tiny.prompts(1, seed=index)[0], SamplingParams(**asked)))
    assert len(work) > 250
    with compilations:
        for prompt, params in work[::5]:
            warm.generate(prompt, params)
        warm.generate([prompt for prompt, _ in work], [params for _, params in work])
        for begin in range(0, len(work), 7):
            part = work[begin : begin + 7]
            warm.generate([prompt for prompt, _ in part], [params for _, params in part])
    assert compilations.seen == []
    assert warm.stats()["late_compilations"] == 0


def test_long_prompts_long_outputs_prefixes_streams_and_resets(warm, compilations):
    with compilations:
        long = (tiny.prompts(1, seed=1)[0] * 128)[:120]
        warm.generate([long, long[:64], long[:1]], SamplingParams(temperature=0, max_tokens=None))
        assert warm.generate(long, SamplingParams(max_tokens=2))[0].num_cached_tokens > 0
        for _, delta in zip(range(3), warm.stream(long, SamplingParams(temperature=0, max_tokens=8)), strict=False):
            assert delta.token_ids
        warm.generate(np.asarray(long), SamplingParams(max_tokens=2))
        list(warm.stream([5, 6, 7], SamplingParams(max_tokens=8), output_token_ids=[8, 9]))
        warm.reset_prefix_cache()
        warm.generate("the ring", SamplingParams(max_tokens=2))
    assert compilations.seen == []
    assert warm.stats()["late_compilations"] == 0


def test_a_first_request_with_tables_right_after_warm_up(checkpoint, compilations):
    """The sampler's tables are made when the first request asks for them."""
    with tiny.llm(checkpoint("llama"), **tiny.LEAST) as llm:
        llm.warm_up()
        with compilations:
            llm.generate([5, 6, 7], SamplingParams(logit_bias={5: 1.0}, bad_words=["the"], min_tokens=1, max_tokens=2))
        assert compilations.seen == []


@pytest.mark.parametrize("asked,compiled", [({"prompt_logprobs": 1}, 2), ({"logprobs": -1}, 1), ({"logprobs": 21}, 1)])
def test_wide_logprobs_are_the_exception_and_say_so(checkpoint, asked, compiled, caplog):
    """A prompt's need a step that leaves all hidden rows, too."""
    with tiny.llm(checkpoint("llama"), **tiny.LEAST) as llm:
        llm.warm_up()
        params = SamplingParams(temperature=0, max_tokens=1, **asked)
        with caplog.at_level(logging.WARNING):
            llm.generate([5, 6, 7], params)
        assert llm.stats()["late_compilations"] == compiled
        assert [record.message for record in caplog.records if "compil" in record.message]
        llm.generate([5, 6, 7, 8], params)
        assert llm.stats()["late_compilations"] == compiled


def test_new_weights_compile_nothing(warm: LLM, compilations):
    runner = warm._client._core.runner  # type: ignore[attr-defined]
    old = runner.device.leaves
    new = [jax.device_put(np.asarray(leaf)[..., ::-1].copy(), leaf.sharding) for leaf in old]
    params = SamplingParams(temperature=0, max_tokens=8)
    before = warm.generate([5, 6, 7], params)[0].outputs[0].token_ids
    warm.reset_prefix_cache()
    with compilations:
        runner.device.replace_weights(new)
        assert warm.generate([5, 6, 7], params)[0].outputs[0].token_ids != before
        runner.device.replace_weights(old)
        assert warm.generate([5, 6, 7], params)[0].outputs[0].token_ids == before
    assert compilations.seen == []
    with pytest.raises(ValueError, match="cannot become"):
        runner.device.replace_weights([leaf[..., :1] for leaf in old])
