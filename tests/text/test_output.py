import random

import pytest

from jaxllm.text.output import OutputText
from tests.text.test_stop_strings import brute_force


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_stream(smollm2):
    output = OutputText(smollm2)
    ids = ids_of(smollm2, "Hello, 🙂 world")
    deltas = [output.append([token]) for token in ids]
    deltas.append(output.append([], finished=True))
    assert "".join(delta.text for delta in deltas) == output.text == "Hello, 🙂 world"
    assert [delta.num_tokens for delta in deltas] == [1] * len(ids) + [0]
    assert output.finished and output.num_tokens == len(ids)
    with pytest.raises(ValueError, match="ended"):
        output.append([1])


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_it_at_the_token_that_completes_them(include, smollm2):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(["ab", " ab", "c", "é", "🙂", "\n"]) for _ in range(12))
        ids = ids_of(smollm2, text)
        stops = [rng.choice(["bab", "b c", "🙂", "\n\n", "éc", "a"])]
        output = OutputText(smollm2, stop=stops, include_stop_str_in_output=include)
        used, at = 0, 0
        while at < len(ids) and not output.finished:
            size = rng.randint(1, 4)
            delta = output.append(ids[at : at + size], finished=at + size >= len(ids))
            used += delta.num_tokens
            at += size
        expected, stop = brute_force(text, stops, include)
        assert (output.text, output.stop_string) == (expected, stop)
        assert delta.stop_string == stop and used == output.num_tokens
        if stop:
            assert stop in smollm2.decode(ids[:used]) and stop not in smollm2.decode(ids[: used - 1])
        else:
            assert used == len(ids)


def test_stop_tokens(smollm2):
    ids = ids_of(smollm2, "Hello")
    comma = ids_of(smollm2, ",")
    for include, expected in ((False, "Hello"), (True, "Hello,")):
        output = OutputText(smollm2, include_stop_str_in_output=include)
        output.append(ids)
        delta = output.append(comma, finished=True, stop_token=True)
        assert output.text == expected and delta.num_tokens == 1 and output.num_tokens == len(ids) + 1
    output = OutputText(smollm2, skip_special_tokens=False)
    assert output.append([*ids, 2], finished=True).text == "Hello<|im_end|>"


def test_held_text_comes_out_at_the_end(smollm2):
    output = OutputText(smollm2, stop=["lo world"])
    assert output.append(ids_of(smollm2, "Hello")).text == "Hel"
    assert output.append([], finished=True).text == "lo"
    half = ids_of(smollm2, "🙂")[:-1]
    output = OutputText(smollm2, stop=["�"])
    assert output.append(half, finished=True).text == "" and output.stop_string == "�"


def test_min_tokens(smollm2):
    ids = ids_of(smollm2, "a b a b a b")
    output = OutputText(smollm2, stop=[" b"], min_tokens=3)
    delta = output.append(ids)
    assert (output.text, delta.num_tokens) == ("a b a", 4)


def test_without_text(smollm2):
    output = OutputText(None, stop=["x"])
    assert output.append([1, 2]).num_tokens == 2
    assert output.append([3], finished=True).text == "" and output.text == "" and output.num_tokens == 3


@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_a_resumed_output_goes_on_as_if_never_interrupted(name, request):
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(1)
    for _ in range(50):
        prompt = ids_of(tokenizer, "two words")
        ids = [rng.randrange(3, tokenizer.vocab_size) for _ in range(20)]
        options = {"stop": ["e", "日"], "min_tokens": rng.randint(0, 10)}
        whole = OutputText(tokenizer, prompt, **options)
        deltas = []
        for token in ids:
            deltas.append(whole.append([token]))
            if whole.finished:
                break
        cut = rng.randint(0, len(deltas) - 1)
        resumed = OutputText(tokenizer, prompt, ids[:cut], **options)
        assert [resumed.append([token]) for token in ids[cut : len(deltas)]] == deltas[cut:]
        assert resumed.text == whole.text and resumed.num_tokens == whole.num_tokens
