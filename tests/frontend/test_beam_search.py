"""Beam search against one over log-probabilities that plain numpy computes."""

import pytest

from jaxllm.errors import InvalidRequestError
from jaxllm.frontend.beam_search import BeamSearchParams, beam_search
from tests.engine import tiny

ENDS = list(range(2, 300, 6))  # so many tokens end a sequence that beams really do


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tiny.write_checkpoint("llama", tmp_path_factory.mktemp("beams"), eos_token_id=ENDS)
    with tiny.llm(directory, max_num_seqs=8) as llm:
        yield llm


def brute_force(prompt: list[int], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """(tokens, cum_logprob) of the best beams: every token of every beam is looked at."""
    width, ends = params.beam_width, set() if params.ignore_eos else set(ENDS)

    def score(beam):
        length = len(beam[0]) - (beam[0][-1] in ENDS)
        return -beam[1] / length**params.length_penalty

    live, ended = [(prompt, 0.0)], []
    for _ in range(params.max_tokens):
        grown = []
        for tokens, total in live:
            logprobs = tiny.reference_logprobs(tokens)[-1]
            for token in logprobs.argsort()[::-1][: 2 * width].tolist():
                if token in ends:
                    ended.append((tokens, total + logprobs[token]))
                else:
                    grown.append(([*tokens, token], total + logprobs[token]))
        live = sorted(grown, key=score)[:width]
    return sorted(ended + live, key=score)[:width]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_beams_are_those_of_brute_force(llm, length_penalty, ignore_eos):
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=ignore_eos, length_penalty=length_penalty)
    prompts = tiny.prompts(3, longest=12)
    outputs = llm.beam_search(prompts, params)
    stopped = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = brute_force(prompt, params)
        assert [sequence.tokens for sequence in output.sequences] == [tokens for tokens, _ in expected]
        for sequence, (_, total) in zip(output.sequences, expected, strict=True):
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-4)
            assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
            stopped += sequence.finish_reason == "stop"
            assert (sequence.stop_reason in ENDS) == (sequence.finish_reason == "stop")
    assert (stopped == 0) == ignore_eos or length_penalty == 2.5


def test_one_beam_is_greedy(llm):
    from jaxllm import SamplingParams

    prompt = tiny.prompts(1)[0]
    (output,) = beam_search(llm, [prompt], BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))
    (greedy,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert output.sequences[0].tokens == prompt + greedy.outputs[0].token_ids
    assert output.sequences[0].finish_reason == "length"


def test_text_prompts_and_the_end_token(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=4, include_stop_str_in_output=True, length_penalty=-3.0)
    (output,) = llm.beam_search("the hand", params)
    ended = [sequence for sequence in output.sequences if sequence.finish_reason == "stop"]
    assert ended
    for sequence in ended:
        assert sequence.tokens[-1] == sequence.stop_reason


def test_the_public_name():
    import jaxllm

    assert jaxllm.BeamSearchParams is BeamSearchParams
    assert jaxllm.TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]}


def test_refusals(llm):
    with pytest.raises(InvalidRequestError, match="beam_width=0"):
        BeamSearchParams(beam_width=0, max_tokens=4)
    with pytest.raises(InvalidRequestError, match="length_penalty=nan"):
        BeamSearchParams(beam_width=1, max_tokens=4, length_penalty=float("nan"))
    for name, value in [
        ("length_penalty", 10.5),
        ("length_penalty", -(10**400)),
        ("length_penalty", "1"),
        ("length_penalty", None),
        ("temperature", float("inf")),
        ("ignore_eos", "no"),
        ("include_stop_str_in_output", 1),
        ("beam_width", 2.0),
        ("max_tokens", True),
    ]:
        with pytest.raises(InvalidRequestError, match=name):
            BeamSearchParams(**{"beam_width": 1, "max_tokens": 4, name: value})
    with pytest.raises(InvalidRequestError, match="params=None: must be BeamSearchParams"):
        llm.beam_search([[5] * 10], None)
    with pytest.raises(InvalidRequestError, match=r"max_tokens=120: at most 118 after 10 prompt tokens"):
        llm.beam_search([[5] * 10], BeamSearchParams(beam_width=2, max_tokens=120))
