"""Requests under a grammar: what comes out has the form asked for, and nobody else notices."""

import json
import math
import re
import time

import numpy as np
import pytest

from jaxllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from tests.engine import tiny

POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -99, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["the", "and", 'o"n']}, "maxItems": 2},
    },
    "required": ["x", "tags"],
    "additionalProperties": False,
}


def form(**asked) -> StructuredOutputsParams:
    return StructuredOutputsParams(**asked)


FORMS: list[StructuredOutputsParams] = [
    form(json=POINT, disable_any_whitespace=True),
    form(regex="(the|an)[0-9]{2,3}(er)*x"),
    form(choice=["the", "there", "other"]),
    form(grammar='start: "(" LEAF ("+" LEAF)* ")"\nLEAF: "a" | "b"'),
]


def holds(asked: StructuredOutputsParams, text: str) -> bool:
    if asked.json is not None:
        value = json.loads(text)
        return (
            set(value) == {"x", "tags"}
            and type(value["x"]) is int
            and abs(value["x"]) <= 99
            and len(value["tags"]) <= 2
            and set(value["tags"]) <= {"the", "and", 'o"n'}
            and text == json.dumps(value, separators=(",", ":"))
        )
    if asked.regex is not None:
        return re.fullmatch(asked.regex, text) is not None
    if asked.choice is not None:
        return text in asked.choice
    return re.fullmatch(r"\([ab](\+[ab])*\)", text) is not None


def constrained(index: int, **changes) -> SamplingParams:
    defaults: dict = dict(seed=index, max_tokens=90, structured_outputs=FORMS[index % len(FORMS)])
    return SamplingParams(**defaults | changes)


def assert_formed(output: RequestOutput, params: SamplingParams) -> None:
    assert params.structured_outputs is not None
    for sample in output.outputs:
        if sample.finish_reason == "stop":
            assert holds(params.structured_outputs, sample.text), sample.text
        else:
            assert sample.finish_reason == "length" and len(sample.token_ids) == params.max_tokens


@pytest.fixture(scope="module")
def work() -> list[tuple[list[int], SamplingParams]]:
    """Requests under grammars, with other wishes beside."""
    wishes: list[dict] = [
        {},
        {"temperature": 0},
        {"temperature": 3.0},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"logit_bias": {tiny.EOS: -3.0, tiny.FIRST_BYTE + ord("9"): 5.0}},
        {"bad_words": ["the1", "10"], "logprobs": 3},
        {"min_tokens": 3, "logprobs": 0},
    ]
    return [(prompt, constrained(i, **wishes[i // 4 % len(wishes)])) for i, prompt in enumerate(prompts(32, seed=9))]


def facts(outputs: list[RequestOutput]) -> list[list[tuple]]:
    return [[(s.token_ids, s.text, s.finish_reason) for s in output.outputs] for output in outputs]


def prompts(count: int, seed: int) -> list[list[int]]:
    """Of letters: after half a character, the text of an output begins with its replacement."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(tiny.FIRST_BYTE + ord("a"), tiny.FIRST_BYTE + ord("z"), (count, 40))
    return [row[: rng.integers(1, 41)].tolist() for row in letters]


def run(llm: LLM, work, **options) -> list[RequestOutput]:
    return llm.generate([prompt for prompt, _ in work], [params for _, params in work], **options)


@pytest.fixture(scope="module")
def alone(engine, work) -> list[RequestOutput]:
    return [run(engine(), [one], cache_salt="form")[0] for one in work]


def test_outputs_have_their_form(work, alone):
    for (_, params), output in zip(work, alone, strict=True):
        assert_formed(output, params)
    finished = [output for output in alone if output.outputs[0].finish_reason == "stop"]
    assert len(finished) >= 20 and len({output.outputs[0].text for output in finished}) >= 15


def test_many_seeds(engine):
    many = [([5, 6, i % 100 + 7], constrained(i, temperature=1.5)) for i in range(120)]
    outputs = run(engine(), many)
    for (_, params), output in zip(many, outputs, strict=True):
        assert_formed(output, params)
    assert sum(output.outputs[0].finish_reason == "stop" for output in outputs) > 80


def test_alone_in_a_batch_beside_others_and_after_prefix_hits(engine, truth, work, alone):
    llm = engine()
    free, free_alone = truth("llama")
    assert facts(run(llm, work, cache_salt="batch")) == facts(alone)
    mixed = [pair for both in zip(free, work, strict=True) for pair in both]
    outputs = run(llm, mixed, cache_salt="mixed")
    assert facts(outputs[1::2]) == facts(alone)
    assert facts(outputs[::2]) == facts(free_alone)
    assert facts(run(llm, work, cache_salt="batch")) == facts(alone)  # the prompts' pages are cached by now


def test_in_chunks_and_only_where_a_grammar_is(engine, work, alone):
    """Before the first request under a grammar there is no mask and no masked sampler."""
    llm = engine(max_num_seqs=8, max_num_batched_tokens=8, token_rungs=(4, 8))
    run(llm, [([5, 6], SamplingParams(max_tokens=5)), ([7], SamplingParams(temperature=0, max_tokens=4))])
    runner = llm._client._core.runner
    assert runner.device._masks is None
    assert not any(getattr(getattr(key, "variant", None), "masked", False) for key in runner.executables._futures)
    assert facts(run(llm, work)) == facts(alone)
    assert runner.device._masks is not None


def test_after_preemption(engine):
    work = [([5 + i, 6], constrained(i, max_tokens=60, structured_outputs=form(regex="[a-z]{50,}"))) for i in range(16)]
    alone = [run(engine(), [one])[0] for one in work]
    llm = engine(kv_cache_memory_bytes=34_000)
    before = llm.stats()["preemptions"]
    assert facts(run(llm, work)) == facts(alone)
    assert llm.stats()["preemptions"] >= before + 5


@pytest.mark.parametrize("where", ["launch", "sample", "read"])
def test_after_a_step_that_failed(checkpoint, work, alone, monkeypatch, where):
    with tiny.llm(checkpoint("llama")) as llm:
        runner = llm._client._core.runner  # type: ignore[attr-defined]
        original, calls = getattr(runner, where), []

        def broken(*args):
            calls.append(args)
            if len(calls) in (7, 8, 21):
                for array in runner.device.caches:
                    array.delete()
                raise RuntimeError("the device says no")
            return original(*args)

        monkeypatch.setattr(runner, where, broken)
        assert facts(run(llm, work)) == facts(alone) and len(calls) > 21


def test_samples_have_a_place_in_the_grammar_each(engine):
    params = constrained(0, n=5, temperature=2.0)
    output = engine().generate([[5] * 20], params)[0]
    assert_formed(output, params)
    assert len({sample.text for sample in output.outputs}) > 1


@pytest.mark.parametrize("logprobs", [-1, 20])
def test_logprobs_are_of_what_the_grammar_allows(engine, logprobs):
    """What is finite is what llguidance allows, at every step; and the rest is as if the other tokens were not."""
    llm = engine()
    compiler = llm._client._core._grammars._compiler
    for index in range(3):
        prompt, params = [5, 6, 7], constrained(index, max_tokens=12, logprobs=logprobs, temperature=1.5)
        sample = run(llm, [(prompt, params)])[0].outputs[0]
        matcher = compiler.compile(params.structured_outputs.checked()).result().deep_copy()
        for at, (token, entries) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
            mask = matcher.compute_bitmask()
            allowed = {t for t in range(tiny.VOCAB) if mask[t // 8] >> t % 8 & 1}
            finite = {t for t, entry in entries.items() if entry.logprob > -math.inf}
            assert finite == allowed if logprobs == -1 or len(allowed) <= 20 else finite < allowed
            expected = tiny.reference_logprobs(prompt + sample.token_ids[:at])[-1]
            total = math.log(sum(math.exp(expected[t]) for t in allowed))
            for t in finite:
                assert entries[t].logprob == pytest.approx(expected[t] - total, abs=2e-3)
                better = sum(expected[other] > expected[t] + 1e-4 for other in allowed)
                assert entries[t].rank >= better + 1 or t != token
            assert matcher.consume_token(token)


def test_resumed_from_its_emitted_tokens(engine, work, alone):
    llm = engine()
    for i in range(0, 32, 5):
        tokens = alone[i].outputs[0].token_ids
        for cut in {1, len(tokens) // 2} - {0, len(tokens)}:
            deltas = list(llm.stream(*work[i], output_token_ids=tokens[:cut]))
            assert tokens[:cut] + [token for delta in deltas for token in delta.token_ids] == tokens
    with pytest.raises(InvalidRequestError, match="output_token_ids"):
        list(llm.stream([5], constrained(2), output_token_ids=[tiny.FIRST_BYTE + ord("q")]))


def test_after_its_end_an_output_holds_ends_only(engine):
    params = constrained(2, ignore_eos=True, max_tokens=12)
    sample = engine().generate([[5]], params)[0].outputs[0]
    assert sample.finish_reason == "length" and len(sample.token_ids) == 12
    text = sample.token_ids[: sample.token_ids.index(tiny.EOS)]
    assert set(sample.token_ids[len(text) :]) == {tiny.EOS} and sample.text in FORMS[2].choice


@pytest.mark.parametrize(
    "wish",
    [{"min_tokens": 8}, {"allowed_token_ids": [5, 6]}, {"bad_words": ["a", "an", "and"]}],
    ids=str,
)
def test_what_no_token_fulfils_is_an_error_of_its_request_alone(engine, wish):
    llm = engine()
    asked = SamplingParams(max_tokens=20, structured_outputs=form(choice=["and"]), **wish)
    beside = constrained(1)
    expected = facts(run(llm, [([7, 8], beside)]))
    outputs = run(llm, [([5], asked), ([7, 8], beside)])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert facts(outputs[1:]) == expected


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "(?=a)"}, "look-around"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"grammar": "start: nothing"}, "nothing"),
    ],
    ids=str,
)
def test_a_refused_grammar_names_its_field_and_harms_nobody(engine, asked, reason):
    llm = engine()
    beside = llm.stream([5, 6, 7], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    first = next(beside)
    with pytest.raises(InvalidRequestError, match=f"(?s)structured_outputs.{next(iter(asked))}.*{reason}"):
        llm.generate([[5]], SamplingParams(structured_outputs=form(**asked)))
    tokens = first.token_ids + [token for delta in beside for token in delta.token_ids]
    llm.reset_prefix_cache()
    again = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    assert tokens == again[0].outputs[0].token_ids


def test_a_grammar_that_goes_over_its_limits_ends_its_request(engine, monkeypatch):
    llm = engine()
    from jaxllm.structured import matcher

    original = matcher.Matcher.check

    def check(self):
        original(self)
        if self.num_consumed == 3:
            self.error = "structured_outputs cannot go on: too complex"

    monkeypatch.setattr(matcher.Matcher, "check", check)
    free = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    outputs = run(llm, [([5], constrained(0)), ([6, 7], free)])
    assert outputs[0].outputs[0].finish_reason == "error" and len(outputs[0].outputs[0].token_ids) == 3
    monkeypatch.undo()
    assert facts(outputs[1:]) == facts(run(llm, [([6, 7], free)]))
    assert not llm._client._core._grammars._matchers


def test_aborted_while_its_grammar_compiles(engine, monkeypatch):
    llm = engine()
    compiler = llm._client._core._grammars._compiler
    slow = compiler._compile

    def slower(params):
        time.sleep(0.5)
        return slow(params)

    monkeypatch.setattr(compiler, "_compile", slower)
    stream = llm.stream([5], constrained(0, structured_outputs=form(regex="never[0-9]seen")))
    core = llm._client._core
    llm.generate([[6]], SamplingParams(max_tokens=3))  # takes the message in, and goes on meanwhile
    collectors = [collector for collector in llm._collectors.values()]
    assert core._grammars.num_held <= 1
    stream.close()
    llm._withdraw(collectors)
    llm.generate([[6]], SamplingParams(max_tokens=3))
    assert core._grammars.num_held == 0 and not core._grammars._matchers


def test_warm_up_prepares_for_grammars_and_nothing_else_does(checkpoint):
    with tiny.llm(checkpoint("llama"), **tiny.LEAST) as llm:
        compiler = llm._client._core._grammars._compiler
        llm.generate([[5, 6]], SamplingParams(max_tokens=2))
        assert compiler._vocabulary is None and not compiler._idle
        llm.warm_up()
        deadline = time.monotonic() + 60
        while not compiler._idle and time.monotonic() < deadline:
            time.sleep(0.02)
        (sandbox,) = compiler._idle
        assert compiler._vocabulary is not None and llm._client._core.runner.device._masks is not None
        output = run(llm, [([5, 6], constrained(2))])[0]
        assert output.outputs[0].text in FORMS[2].choice and compiler._idle == [sandbox]


def test_a_model_that_has_no_grammars_warms_up(checkpoint, monkeypatch, caplog):
    with tiny.llm(checkpoint("llama"), **tiny.LEAST) as llm:
        compiler = llm._client._core._grammars._compiler

        def fails():
            raise AssertionError("no bytes")

        monkeypatch.setattr(compiler, "_load_vocabulary", fails)
        llm.warm_up()
        compiler._pool.submit(lambda: None).result(timeout=60)
        assert llm.generate([[5, 6]], SamplingParams(max_tokens=2))[0].outputs[0].token_ids
        assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_a_held_step_overlaps(engine, monkeypatch):
    """The forward pass of a step under a grammar is launched before the step before it is read."""
    llm = engine()
    runner = llm._client._core.runner
    events: list[str] = []
    for name in ("launch", "read", "sample"):
        original = getattr(runner, name)
        monkeypatch.setattr(runner, name, lambda *a, o=original, n=name: (events.append(n), o(*a))[1])
    run(llm, [([5, 6], constrained(1, temperature=0))])
    middle = events[3:-3]
    assert middle and "".join(name[0] for name in middle).startswith(("lrs" * 2, "rsl" * 2, "slr" * 2))


def test_without_the_library_it_is_refused(engine, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llguidance" else original(name, *rest)
    )
    with pytest.raises(InvalidRequestError, match=r"structured_outputs.*jaxllm\[serve\]"):
        engine().generate([[5]], constrained(0))


def test_without_an_end_of_sequence_token_it_is_refused(engine, monkeypatch):
    llm = engine()
    monkeypatch.setattr(llm._builder, "eos_token_ids", frozenset())
    with pytest.raises(InvalidRequestError, match=r"structured_outputs.*end-of-sequence"):
        llm.generate([[5]], constrained(0))
    monkeypatch.setattr(llm._builder, "tokenizer", None)
    with pytest.raises(InvalidRequestError, match=r"structured_outputs.*no tokenizer"):
        llm.generate([[5]], constrained(0))
