"""A mask holds just the tokens after which the output can still become what was asked for."""

import json
import re

import numpy as np
import pytest

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.structured.matcher import Masks, Matcher
from tests.engine.tiny import EOS, FIRST_BYTE, VOCAB

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"enum": ["the", "and"]}},
    "required": ["x"],
    "additionalProperties": False,
}
ASKED = [
    StructuredOutputsParams(json=POINT),
    StructuredOutputsParams(json=json.dumps(POINT), disable_any_whitespace=True),
    StructuredOutputsParams(json={"type": "array", "items": {"type": "boolean"}}, whitespace_pattern=" "),
    StructuredOutputsParams(json_object=True),
    StructuredOutputsParams(regex="(the|an)[0-9]{2,3}(er)*"),
    StructuredOutputsParams(choice=["the", "there", 'say "in"\n', "\\", "é", "🐈 on"]),
    StructuredOutputsParams(grammar='start: "(" start ")" | NAME\nNAME: /[a-z]+/'),
    StructuredOutputsParams(grammar='root ::= "x" ("+" root)?'),
]


def allowed(masks: Masks, matchers: list[Matcher]) -> list[list[int]]:
    words = np.zeros((len(matchers), -(-VOCAB // 32)), np.int32)
    masks.fill(matchers, words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert not bits[:, VOCAB:].any()
    return [np.flatnonzero(row).tolist() for row in bits]


def walk(compiler, params: StructuredOutputsParams, seed: int, longest: int = 40) -> bytes:
    """Random tokens from each mask; asserts that the mask is what a check of every single token says."""
    rng = np.random.default_rng(seed)
    start = compiler.compile(params.checked()).result()
    masks, matcher, output = Masks(), Matcher(start), []
    while True:
        (tokens,) = allowed(masks, [matcher])
        fresh = start.deep_copy()
        assert fresh.consume_tokens(output) or not output
        possible = {token for token in range(VOCAB) if fresh.validate_tokens([token]) == 1}
        possible |= {EOS} if fresh.is_accepting() else set()
        if tokens != sorted(possible):  # one text can follow, and these are its tokens
            assert len(tokens) == 1 and set(tokens) < possible
            assert fresh.compute_ff_bytes().startswith(TOKENS[tokens[0]])
        if len(output) >= longest and EOS in tokens:
            token = EOS
        else:
            token = int(rng.choice(tokens))
        if token == EOS:
            return b"".join(TOKENS[t] for t in output)
        output.append(token)
        matcher.follow(output)
        assert matcher.error is None


TOKENS: list[bytes] = []


@pytest.fixture(autouse=True, scope="module")
def _tokens(vocabulary):
    TOKENS[:] = vocabulary.tokens


@pytest.mark.parametrize("index", range(len(ASKED)))
def test_masks_are_what_single_tokens_say(compiler, index):
    params = ASKED[index]
    for seed in range(3):
        if params.json_object or (params.grammar and "NAME" in params.grammar):
            continue  # random tokens open more than they close
        text = walk(compiler, params, seed).decode()
        if params.choice:
            assert text in params.choice
        elif params.regex:
            assert re.fullmatch(params.regex, text)
        elif params.grammar:
            assert re.fullmatch(r"x(\+x)*", text)
        else:
            value = json.loads(text)
            if isinstance(value, dict):
                assert isinstance(value["x"], int) and set(value) <= {"x", "name"}
                assert value.get("name", "the") in ("the", "and")
            else:
                assert all(isinstance(item, bool) for item in value)
            if params.disable_any_whitespace:
                assert text == json.dumps(value, separators=(",", ":"))
            if params.whitespace_pattern:
                assert not re.search(r"[\t\n\r]|  ", text)


def test_many_at_once_are_each_as_alone(compiler):
    masks = Masks()
    starts = [compiler.compile(params.checked()).result() for params in ASKED]
    matchers = [Matcher(starts[i % len(starts)]) for i in range(64)]
    for i, matcher in enumerate(matchers):
        output: list[int] = []
        for _ in range(i // 8):
            (tokens,) = allowed(masks, [matcher])
            output.append(tokens[len(tokens) // 2])
            matcher.follow(output)
    assert allowed(masks, matchers) == [allowed(masks, [matcher])[0] for matcher in matchers]


def test_a_whole_output_allows_its_end_only(compiler):
    matcher = Matcher(compiler.compile(StructuredOutputsParams(choice=["ab"])).result())
    matcher.follow([FIRST_BYTE + ord("a"), FIRST_BYTE + ord("b")])
    assert allowed(Masks(), [matcher]) == [[EOS]]
    matcher.follow([FIRST_BYTE + ord("a"), FIRST_BYTE + ord("b"), EOS])
    assert matcher.error is None and allowed(Masks(), [matcher]) == [[EOS]]


def test_a_forbidden_token_is_an_error_of_its_matcher_alone(compiler):
    start = compiler.compile(StructuredOutputsParams(choice=["ab"])).result()
    one, other = Matcher(start), Matcher(start)
    one.follow([FIRST_BYTE + ord("b")])
    assert one.error is not None and "structured_outputs" in one.error
    other.follow([FIRST_BYTE + ord("a")])
    assert other.error is None and allowed(Masks(), [one, other])[1] == [FIRST_BYTE + ord("b")]


def test_tags_are_free_text_with_structures_in_it(compiler):
    tag = {
        "structures": [{"begin": "<f=the>", "schema": {"type": "boolean"}, "end": "</f>"}],
        "triggers": ["<f="],
    }
    start = compiler.compile(StructuredOutputsParams(structural_tag=json.dumps(tag)).checked()).result()

    def goes(text: str) -> bool:
        tokens = [FIRST_BYTE + byte for byte in text.encode()]
        return start.deep_copy().validate_tokens(tokens) == len(tokens)

    assert goes("anything at all") and goes("well, <f=the>true</f> and <f=the>false</f>.")
    assert not goes("<f=an") and not goes("<f=the>1") and not goes("<f=the>true</g>")


def test_special_tokens_match_no_text_but_their_name(compiler):
    text = compiler.compile(StructuredOutputsParams(regex="(.|\n)*")).result()
    (tokens,) = allowed(Masks(), [Matcher(text)])
    assert not {0, 1} & set(tokens) and EOS in tokens
    named = compiler.compile(StructuredOutputsParams(grammar='start: "a" <s> "b"')).result()
    assert named.validate_tokens([FIRST_BYTE + ord("a"), 1, FIRST_BYTE + ord("b")]) == 3
