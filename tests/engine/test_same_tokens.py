"""A request's tokens depend on its prompt, its parameters and its seed: not on what runs beside it, nor on how."""

import dataclasses

import numpy as np
import pytest

from jaxllm import LLM, RequestOutput, SamplingParams
from jaxllm.core.seeds import derive_seed
from jaxllm.engine.executables import Forward
from tests.engine import tiny

KINDS = ("llama", "mistral", "gemma2")
# Where Mistral's window says nothing that Gemma 2's, beside full attention, does not: how steps are cut touches no
# cache group.
WITHOUT_MISTRAL = ("llama", pytest.param("mistral", marks=pytest.mark.slow), "gemma2")
CHUNKED = dict(max_num_seqs=8, max_num_batched_tokens=8, token_rungs=(4, 8))
TIGHT = dict(kv_cache_memory_bytes=34_000)  # pages for one request of max_model_len


def facts(output: RequestOutput) -> list[tuple]:
    return [(sample.token_ids, sample.text, sample.finish_reason, sample.stop_reason) for sample in output.outputs]


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert facts(one) == facts(other), f"request {index}"
        for sample, same in zip(one.outputs, other.outputs, strict=True):
            assert_same_logprobs(sample.logprobs, same.logprobs)


def assert_same_logprobs(found, expected) -> None:
    assert (found is None) == (expected is None)
    for one, other in zip(found or [], expected or [], strict=True):
        assert one.keys() == other.keys()
        values = [entry.logprob for entry in one.values()], [entry.logprob for entry in other.values()]
        np.testing.assert_allclose(*values, atol=1e-4)


def run(llm: LLM, work, **options) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in work], [params for _, params in work], **options)


def test_greedy_tokens_are_those_of_the_whole_sequence_computed_anew(truth):
    """The first word is the reference's; everything below compares engines with engines."""
    work, alone = truth("llama")
    plain = [
        i
        for i, (_, p) in enumerate(work)
        if p.temperature == 0 and p == SamplingParams(temperature=0, max_tokens=p.max_tokens, seed=p.seed)
    ]
    assert len(plain) >= 3
    for i in plain:
        prompt, tokens = work[i][0], alone[i].outputs[0].token_ids
        best = tiny.reference_logits(prompt + tokens[:-1])[len(prompt) - 1 :].argmax(axis=1)
        assert tokens == best.tolist()


def test_the_requests_are_worth_comparing(truth):
    _, alone = truth("llama")
    sequences = [tuple(output.outputs[0].token_ids) for output in alone]
    assert len(set(sequences)) == 32 and sum(map(len, sequences)) > 250
    assert {output.outputs[0].finish_reason for output in alone} == {"stop", "length"}
    assert max(len(set(tokens)) for tokens in sequences) > 15


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_batch_of_32(kind, engine, truth):
    work, alone = truth(kind)
    assert_same(run(engine(kind), work, cache_salt="batch"), alone)
    again = [31 - i for i in range(32)]  # other neighbours, other slots
    assert_same(run(engine(kind), [work[i] for i in again], cache_salt="reversed"), [alone[i] for i in again])


@pytest.mark.parametrize("kind", WITHOUT_MISTRAL)
def test_with_steps_of_decodes_only(kind, engine, truth):
    work, alone = truth(kind)
    llm = engine(kind, decode_rungs=(1, 8, 32))
    assert_same(run(llm, work, cache_salt="decodes"), alone)
    ready = [key for key in llm._client._core.runner.executables._futures if isinstance(key, Forward)]
    assert any(key.decodes_only for key in ready) and any(not key.decodes_only for key in ready)


@pytest.mark.parametrize("kind", WITHOUT_MISTRAL)
def test_in_chunks(kind, engine, truth):
    work, alone = truth(kind)
    llm = engine(kind, **CHUNKED)
    steps = llm.stats()["steps"]
    longest = max(range(32), key=lambda i: len(work[i][0]))
    assert_same(run(llm, [work[longest]], cache_salt="one"), [alone[longest]])
    chunks = -(-len(work[longest][0]) // 8)
    assert chunks >= 4 and llm.stats()["steps"] - steps >= chunks + len(alone[longest].outputs[0].token_ids) - 1
    assert_same(run(llm, work, cache_salt="all"), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_prefix_hit(kind, engine, truth):
    work, alone = truth(kind)
    llm = engine(kind)
    run(llm, work, cache_salt="hit")
    before = llm.stats()
    found = run(llm, work, cache_salt="hit")
    assert_same(found, alone)
    after = llm.stats()
    hits = [output.num_cached_tokens for output in found]
    most = [(len(prompt) - 1) // 8 * 8 for prompt, _ in work]
    if kind == "llama":
        assert hits == most
    else:  # a window group is small: some pages have been given away
        assert all(hit in (0, full) for hit, full in zip(hits, most, strict=True))
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] == sum(hits) > 200
    assert after["prefix_queried_tokens"] - before["prefix_queried_tokens"] == sum(len(prompt) for prompt, _ in work)


def test_a_prefix_is_found_neither_under_another_salt_nor_after_a_reset(engine):
    llm = engine()
    params = SamplingParams(temperature=0, max_tokens=2)
    prompt = tiny.prompts(1, seed=77)[0] + [5] * 30

    def cached(**options) -> int:
        return llm.generate(prompt, params, **options)[0].num_cached_tokens

    assert cached() == 0 and cached() >= 24
    assert cached(cache_salt="other") == 0 and cached(cache_salt="other") >= 24
    llm.reset_prefix_cache()
    assert cached() == 0 and cached(cache_salt="other") == 0
    other = engine(enable_prefix_caching=False)
    assert [other.generate(prompt, params)[0].num_cached_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_after_preemption(kind, engine):
    """Many start, then all of them grow."""
    work = [(prompt, tiny.mixed_params(i, max_tokens=60)) for i, prompt in enumerate(tiny.prompts(16, 5, longest=8))]
    alone = [engine(kind).generate(prompt, params, cache_salt="tight")[0] for prompt, params in work]
    llm = engine(kind, **TIGHT)
    before = llm.stats()["preemptions"]
    assert_same(run(llm, work), alone)
    assert llm.stats()["preemptions"] >= before + 5
    assert llm.stats()["running"] == llm.stats()["waiting"] == llm.stats()["cache_usage"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_after_preemption_for_priority(kind, engine, truth):
    work, alone = truth(kind)
    llm = engine(kind, scheduling_policy="priority", **TIGHT)
    before = llm.stats()["preemptions"]
    early = [llm.stream(*work[i]) for i in range(10)]
    tokens = [next(stream).token_ids for stream in early]
    found = run(llm, work[10:], priority=[-1 - i % 3 for i in range(22)])
    assert llm.stats()["preemptions"] > before
    assert_same(found, alone[10:])
    for i, stream in enumerate(early):
        assert tokens[i] + [token for delta in stream for token in delta.token_ids] == alone[i].outputs[0].token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_its_emitted_tokens(kind, engine, truth):
    work, alone = truth(kind)
    llm = engine(kind)
    count = 0
    for i, (prompt, params) in enumerate(work):
        tokens, text = alone[i].outputs[0].token_ids, alone[i].outputs[0].text
        for cut in sorted({1, len(tokens) // 2, len(tokens) - 1} - {0, len(tokens)})[i % 2 :]:
            deltas = list(llm.stream(prompt, params, output_token_ids=tokens[:cut]))
            assert [token for delta in deltas for token in delta.token_ids] == tokens[cut:], f"request {i} at {cut}"
            assert deltas[-1].finish_reason == alone[i].outputs[0].finish_reason
            assert text.endswith("".join(delta.text for delta in deltas))
            count += 1
    assert count > 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, TIGHT], ids=["roomy", "tight"])
def test_samples_are_those_of_their_seeds_alone(kind, options, engine):
    """The followers share the leader's pages, and so come after it."""
    llm = engine(kind, **options)
    work = [
        (prompt + [9] * 16, tiny.mixed_params(2 * i + 1, ignore_eos=True))
        for i, prompt in enumerate(tiny.prompts(5, seed=3, longest=30))
    ]
    grouped = run(llm, [(prompt, dataclasses.replace(params, n=4)) for prompt, params in work], cache_salt="n")
    for (prompt, params), output in zip(work, grouped, strict=True):
        if not options:  # in a tight cache the leader's pages may be gone before a follower's turn
            assert output.num_cached_tokens == (len(prompt) - 1) // 8 * 8 > 0
        assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
        for index, sample in enumerate(output.outputs):
            single = dataclasses.replace(params, seed=derive_seed(params.seed or 0, index))
            expected = llm.generate(prompt, single, cache_salt=f"alone {index}")[0].outputs[0]
            assert (sample.index, sample.token_ids, sample.text) == (index, expected.token_ids, expected.text)


def test_beside_streams_that_come_and_go(engine, truth):
    work, alone = truth("llama")
    llm = engine()
    streams = [(i, llm.stream(*work[i])) for i in range(0, 32, 3)]
    seen: dict[int, list[int]] = {i: [] for i, _ in streams}
    rng = np.random.default_rng(0)
    while streams:
        at = int(rng.integers(len(streams)))
        i, stream = streams[at]
        delta = next(stream, None)
        if delta is not None:
            seen[i] += delta.token_ids
        if delta is None or (i % 2 and len(seen[i]) >= 3):  # odd ones are left early
            stream.close()
            streams.pop(at)
        if rng.random() < 0.05:
            assert_same(run(llm, work[:2]), alone[:2])
    for i, tokens in seen.items():
        expected = alone[i].outputs[0].token_ids
        assert tokens == (expected[: len(tokens)] if i % 2 else expected)
    while llm.stats()["running"]:
        pass
