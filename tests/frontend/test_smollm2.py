"""The default model end to end: real weights, real text, compiled as for users."""

import json

import pytest

from jaxllm import LLM, SamplingParams
from tests import compilation
from tests.smollm2 import SIZES


@pytest.fixture(scope="module")
def llm():
    with pytest.MonkeyPatch.context() as patch:
        compilation.as_users(patch)
        with LLM("smollm2", warm_up=False, engine_process=True, **SIZES) as llm:
            yield llm


@pytest.fixture(scope="module")
def goldens(root):
    return json.loads((root / "tests" / "models" / "goldens" / "smollm2_greedy.json").read_text())


def test_greedy_continuations_are_those_of_transformers(llm, goldens):
    """All at once, and then from cached prefixes, the prompts as text."""
    params = SamplingParams(temperature=0, max_tokens=len(goldens[0]["output_ids"]), ignore_eos=True)
    for prompts in ([case.get("prompt", case["prompt_ids"]) for case in goldens], [c["prompt_ids"] for c in goldens]):
        for case, output in zip(goldens, llm.generate(prompts, params), strict=True):
            assert output.prompt_token_ids == case["prompt_ids"]
            assert output.outputs[0].token_ids == case["output_ids"]
            assert output.outputs[0].text == case["text"]
    assert llm.stats()["prefix_hit_tokens"] > 0


def test_a_chat_ends_by_itself(llm):
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40))[0].outputs[0]
    assert "Paris" in output.text and (output.finish_reason, output.stop_reason) == ("stop", None)
    assert "<|im_end|>" not in output.text and output.token_ids[-1] == llm.get_tokenizer().eos_token_id
    assert (
        "".join(delta.text for delta in llm.stream(messages, SamplingParams(temperature=0, max_tokens=40)))
        == output.text
    )


def test_stop_strings_and_bad_words_in_real_text(llm):
    prompt, plain = "The capital of France is", SamplingParams(temperature=0, max_tokens=12)
    text = llm.generate(prompt, plain)[0].outputs[0].text
    assert text.startswith(" Paris.")
    stopped = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12, stop="is."))[0].outputs[0]
    assert (stopped.text, stopped.stop_reason) == (" Par", "is.")
    without = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12, bad_words=["Paris"]))[0].outputs[0]
    assert "Paris" not in without.text


def test_characters_of_several_tokens_stream_whole(llm):
    smile = llm.get_tokenizer().encode("🙂", add_special_tokens=False)
    assert len(smile) > 1
    prompt = llm.get_tokenizer().encode("Smile: ")
    deltas = []
    for token in smile:  # token by token, each the only one allowed, as a request that goes on and on
        params = SamplingParams(temperature=0, max_tokens=len(deltas) + 1, allowed_token_ids=[token])
        deltas += llm.stream(prompt, params, output_token_ids=smile[: len(deltas)])
    assert [delta.token_ids for delta in deltas] == [[token] for token in smile]
    assert deltas[-1].text == "🙂"
