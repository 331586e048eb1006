"""What each sampling parameter does, from the front door to the text."""

import collections

import numpy as np
import pytest

from jaxllm import SamplingParams
from tests.engine import tiny

PROMPT = tiny.prompts(1, seed=1)[0]


def tokens_of(llm, prompt=PROMPT, **params) -> list[int]:
    return (
        llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 12, **params}))[0].outputs[0].token_ids
    )


@pytest.fixture
def llm(engine):
    return engine()


def sampled(llm, count: int = 64, **params) -> list[int]:
    """First tokens under many seeds."""
    asked = [SamplingParams(max_tokens=1, seed=seed, ignore_eos=True, **params) for seed in range(count)]
    return [output.outputs[0].token_ids[0] for output in llm.generate([PROMPT] * count, asked)]


def ranked() -> list[int]:
    return np.argsort(-tiny.reference_logits(PROMPT)[-1]).tolist()


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(llm):
    asked = dict(temperature=1.0, max_tokens=12, ignore_eos=True)
    assert tokens_of(llm, seed=3, **asked) == tokens_of(llm, seed=3, **asked)
    assert tokens_of(llm, seed=3, **asked) != tokens_of(llm, seed=4, **asked)
    assert tokens_of(llm, seed=-1, **asked) == tokens_of(llm, seed=2**64 - 1, **asked)
    assert tokens_of(llm, seed=1, **asked) != tokens_of(llm, seed=1 + 2**32, **asked)
    assert len({tuple(tokens_of(llm, **asked)) for _ in range(4)}) == 4  # without a seed: a new one each time


def test_temperature(llm):
    cold, hot = sampled(llm, temperature=0.05), sampled(llm, temperature=5.0)
    assert set(cold) <= set(ranked()[:2]) and len(set(hot)) > 40


def test_top_k_top_p_and_min_p(llm):
    logprobs = tiny.reference_logprobs(PROMPT)[-1]
    order = ranked()
    assert set(sampled(llm, 128, top_k=3)) == set(order[:3])
    assert set(sampled(llm, 16, top_k=1, temperature=2.0)) == {order[0]}
    within = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order]) < 0.5
    assert set(sampled(llm, 128, top_p=0.5)) <= {token for token, keep in zip(order, within, strict=True) if keep}
    likely = {token for token in order if logprobs[token] >= logprobs[order[0]] + np.log(0.3)}
    assert set(sampled(llm, 128, min_p=0.3)) == likely


def test_logit_bias_allowed_tokens_and_bad_words(llm):
    assert tokens_of(llm, logit_bias={77: 100.0}) == [77] * 12
    first = tokens_of(llm)[0]
    assert tokens_of(llm, logit_bias={first: -100.0})[0] == ranked()[1]
    assert set(tokens_of(llm, allowed_token_ids=[50, 51, 52], temperature=1.0)) <= {50, 51, 52}
    e, th, he = (llm.get_tokenizer().encode(text)[0] for text in ("e", "th", "he"))
    wanted = dict(allowed_token_ids=[e, th, he], logit_bias={th: 50.0, e: 25.0})
    assert set(tokens_of(llm, **wanted)) == {th}
    assert set(tokens_of(llm, **wanted, bad_words=["th"])) == {e}
    # two tokens: the second is forbidden after the first
    z = llm.get_tokenizer().encode("z")[0]
    assert tokens_of(llm, allowed_token_ids=[z, e], logit_bias={z: 50.0}, bad_words=["zz"], max_tokens=4) == [
        z,
        e,
        z,
        e,
    ]


def test_penalties(llm):
    free = collections.Counter(tokens_of(llm, ignore_eos=True, max_tokens=80))
    frequency = collections.Counter(tokens_of(llm, frequency_penalty=2.0, ignore_eos=True, max_tokens=80))
    presence = collections.Counter(tokens_of(llm, presence_penalty=2.0, ignore_eos=True, max_tokens=80))
    assert max(frequency.values()) < max(free.values()) and len(presence) > len(free)
    # a repetition penalty sees the prompt, the others the output alone
    prompt, allowed = [60] * 6 + [70] * 3, [60, 61, 62, 63]
    logits = tiny.reference_logits(prompt)[-1]
    penalized = np.where(logits > 0, logits / 5, logits * 5)
    expected = max(allowed, key=lambda token: penalized[token] if token in prompt else logits[token])
    assert tokens_of(llm, prompt, repetition_penalty=5.0, allowed_token_ids=allowed, max_tokens=1) == [expected]
    assert tokens_of(llm, prompt, presence_penalty=2.0, max_tokens=1) == [int(logits.argmax())]


def test_max_tokens_and_max_model_len(llm):
    def output(prompt, **params):
        return llm.generate(prompt, SamplingParams(temperature=0, ignore_eos=True, **params))[0].outputs[0]

    assert [len(output([7] * 8, max_tokens=n).token_ids) for n in (1, 2, 9)] == [1, 2, 9]
    assert output([7] * 8, max_tokens=9).finish_reason == "length"
    for asked in (None, 1000, 2**62):
        full = output([7] * 100, max_tokens=asked)
        assert (len(full.token_ids), full.finish_reason) == (28, "length")
    assert len(output([7] * 127, max_tokens=5).token_ids) == 1
    assert len(llm.generate([7] * 8, SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 16


def test_eos_and_stop_tokens(llm):
    eos = {tiny.EOS: 100.0}
    ended = llm.generate(PROMPT, SamplingParams(temperature=0, logit_bias=eos))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason, ended.text) == ([tiny.EOS], "stop", None, "")
    kept = llm.generate(PROMPT, SamplingParams(temperature=0, logit_bias=eos, ignore_eos=True, max_tokens=3))[
        0
    ].outputs[0]
    assert (kept.token_ids, kept.finish_reason) == ([tiny.EOS] * 3, "length")
    tokens = tokens_of(llm, ignore_eos=True)
    cut = tokens[: tokens.index(tokens[4]) + 1]
    params = SamplingParams(temperature=0, stop_token_ids=[tokens[4]], max_tokens=12, ignore_eos=True)
    found = llm.generate(PROMPT, params)[0].outputs[0]
    assert (found.token_ids, found.finish_reason, found.stop_reason) == (cut, "stop", tokens[4])
    by_eos = SamplingParams(temperature=0, stop_token_ids=[tiny.EOS], ignore_eos=True, logit_bias=eos)
    assert llm.generate(PROMPT, by_eos)[0].outputs[0].stop_reason == tiny.EOS


def test_the_text_of_a_stop_token(llm):
    th, z = (llm.get_tokenizer().encode(text)[0] for text in ("th", "z"))
    asked = dict(temperature=0, allowed_token_ids=[th, z], bad_words=["zz"], logit_bias={z: 50.0}, stop_token_ids=[th])
    assert llm.generate("the", SamplingParams(**asked))[0].outputs[0].text == "z"
    params = SamplingParams(**asked, include_stop_str_in_output=True)
    found = llm.generate("the", params)[0].outputs[0]
    assert (found.text, found.token_ids, found.stop_reason) == ("zth", [z, th], th)


def test_min_tokens_holds_back_eos_stop_tokens_and_stop_strings(llm):
    z = llm.get_tokenizer().encode("z")[0]
    eos = llm.generate(PROMPT, SamplingParams(temperature=0, logit_bias={tiny.EOS: 100.0}, min_tokens=5))[0].outputs[0]
    assert len(eos.token_ids) == 6 and eos.token_ids.index(tiny.EOS) == 5
    both = dict(logit_bias={z: 100.0, 90: 90.0}, stop_token_ids=[z])
    assert tokens_of(llm, min_tokens=3, **both) == [90, 90, 90, z]
    stopped = SamplingParams(temperature=0, logit_bias={z: 100.0}, stop=["zz"], min_tokens=5, max_tokens=12)
    assert llm.generate(PROMPT, stopped)[0].outputs[0].token_ids == [z] * 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(llm, include, stream):
    plain = SamplingParams(
        temperature=0,
        max_tokens=40,
        ignore_eos=True,
        allowed_token_ids=[*(llm.get_tokenizer().encode(c)[0] for c in "abcdefgh"), *range(259, 275)],
    )
    whole = llm.generate(PROMPT, plain)[0].outputs[0]
    text = whole.text
    starts = [sum(len(llm.get_tokenizer().token_text(t)) for t in whole.token_ids[:i]) for i in range(41)]
    first = next(at for at in range(7, 30) if text.index(text[at : at + 5]) == at)  # its first occurrence
    stop = text[first : first + 5]
    params = SamplingParams(**{**vars_of(plain), "stop": [stop, "never"], "include_stop_str_in_output": include})
    if stream:
        deltas = list(llm.stream(PROMPT, params))
        found_text, found = "".join(delta.text for delta in deltas), deltas[-1]
        tokens = [token for delta in deltas for token in delta.token_ids]
    else:
        found = llm.generate(PROMPT, params)[0].outputs[0]
        found_text, tokens = found.text, found.token_ids
    assert found_text == text[: first + 5 if include else first]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)
    assert tokens == whole.token_ids[: next(i for i, start in enumerate(starts) if start >= first + 5)]
    assert llm.stats()["running"] == 0


def vars_of(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def test_special_tokens_and_detokenize(llm):
    asked = dict(temperature=0, logit_bias={tiny.BOS: 100.0}, max_tokens=2)
    assert llm.generate(PROMPT, SamplingParams(**asked))[0].outputs[0].text == ""
    assert llm.generate(PROMPT, SamplingParams(**asked, skip_special_tokens=False))[0].outputs[0].text == "<s><s>"
    silent = llm.generate(PROMPT, SamplingParams(temperature=0, detokenize=False))[0].outputs[0]
    assert silent.text == "" and len(silent.token_ids) == 16


def test_text_is_the_tokenizers_and_streams_add_up(llm):
    for index in range(6):
        params = tiny.mixed_params(index, ignore_eos=True, stop_token_ids=None)
        output = llm.generate(PROMPT, params)[0].outputs[0]
        streamed = "".join(delta.text for delta in llm.stream(PROMPT, params))
        assert streamed == output.text
        whole = llm.get_tokenizer().decode(PROMPT + output.token_ids)
        assert output.text == "" or whole.endswith(output.text)


def test_generation_config_gives_the_defaults(tmp_path):
    import json

    directory = tiny.write_checkpoint("llama", tmp_path / "model")
    defaults = {"temperature": 0.4, "top_k": 7, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    file = {**defaults, "max_new_tokens": 5, "eos_token_id": [tiny.EOS, 40], "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(file))
    with tiny.llm(directory) as llm:
        params = llm.get_default_sampling_params()
        assert {name: getattr(params, name) for name in defaults} == defaults and params.max_tokens == 5
        ended = llm.generate(PROMPT, SamplingParams(temperature=0, logit_bias={40: 100.0}))[0].outputs[0]
        assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([40], "stop", None)
        assert len(llm.generate(PROMPT)[0].outputs[0].token_ids) <= 5
