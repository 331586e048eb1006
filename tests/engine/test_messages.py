"""What the core and its clients say to each other survives the way, and nothing else gets through."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine import messages
from jaxllm.engine.messages import decode, encode

ids = st.text(max_size=20)
token = st.integers(0, 2**31 - 1)
tokens = st.lists(token, max_size=20)
number = st.floats(allow_nan=False, allow_infinity=False)
word64 = st.integers(-(2**63), 2**64 - 1)
unsigned64 = st.integers(0, 2**64 - 1)

params = st.builds(
    SamplingParams,
    n=st.integers(1, 1024),
    temperature=st.floats(0, 1e6) | st.integers(0, 10),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**40),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(1e-3, 1e3),
    seed=st.none() | word64,
    logit_bias=st.none() | st.dictionaries(token, st.floats(-100, 100), max_size=5),
    allowed_token_ids=st.none() | st.lists(token, min_size=1, max_size=5),
    bad_words=st.none() | st.lists(st.text(min_size=1, max_size=5), max_size=3),
    max_tokens=st.none() | st.integers(1, 2**40),
    logprobs=st.none() | st.integers(-1, 100),
    prompt_logprobs=st.none() | st.integers(-1, 100),
    stop=st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.none() | tokens,
    ignore_eos=st.booleans(),
)
logprobs = st.builds(
    messages.Logprobs, token, number, token, top_ids=tokens, top_logprobs=st.lists(number, max_size=20)
)
output = st.builds(
    messages.SequenceOutput,
    id=ids,
    token_ids=tokens,
    logprobs=st.none() | st.lists(logprobs, max_size=3),
    prompt_logprobs=st.none() | st.lists(logprobs, max_size=3),
    finish_reason=st.none() | st.sampled_from(["stop", "length", "abort", "error"]),
    stop_token=st.none() | token,
    error=st.none() | st.text(max_size=20),
    refused=st.none() | st.tuples(ids, ids, ids),
)
scalars = st.none() | st.booleans() | word64 | number | st.text(max_size=10)
message = st.one_of(
    st.builds(
        messages.AddRequest,
        id=ids,
        prompt_token_ids=tokens,
        params=params,
        max_tokens=st.integers(1, 2**40),
        stop_token_ids=tokens,
        seed=unsigned64,
        arrival=number,
        output_token_ids=tokens,
        bad_words=st.lists(tokens, max_size=3),
        priority=st.integers(-(2**63), 2**63 - 1),
        cache_salt=ids,
        adapter=st.none() | ids,
        leader=st.none() | ids,
    ),
    st.builds(messages.Finish, ids=st.lists(ids, max_size=3), reason=st.sampled_from(["abort", "stop"])),
    st.builds(messages.Utility, call=st.integers(0, 2**62), name=ids),
    st.builds(messages.StepOutputs, outputs=st.lists(output, max_size=3)),
    st.builds(messages.UtilityResult, call=st.integers(0, 2**62), value=st.dictionaries(ids, scalars), error=st.none()),
    st.builds(messages.Ready, *[st.integers(1, 2**40)] * 4),
    st.builds(messages.Dead, kind=ids, error=ids),
)


@given(message)
def test_there_and_back(sent):
    assert decode(encode(sent)) == sent


def test_every_message_is_covered_by_the_test_above():
    kinds = {*messages._TO.values(), *messages._FROM.values()}
    assert kinds == {
        kind
        for kind in vars(messages).values()
        if dataclasses.is_dataclass(kind) and kind.__module__ == messages.__name__
    } - {messages.Logprobs, messages.SequenceOutput}


@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    with pytest.raises(msgspec.DecodeError):
        decode(data)


@given(message, st.data())
def test_damaged_messages_decode_to_a_message_or_are_refused(sent, data):
    raw = bytearray(encode(sent))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for damaged in (bytes(raw), bytes(raw[:cut])):
        try:
            found = decode(damaged)
        except msgspec.DecodeError:
            continue
        assert type(found) in messages._NAMES


@pytest.mark.parametrize(
    "wrong",
    [
        ["add", {}],
        ["shout", {}],
        ["finish", {"ids": "abc"}],
        ["utility", {"call": "one", "name": "stats"}],
        ["outputs", {"outputs": [{"id": "x", "token_ids": [1.5]}]}],
        [["add"], {}],
        {"add": {}},
        None,
    ],
)
def test_what_is_no_message_is_refused(wrong):
    with pytest.raises(msgspec.DecodeError):
        decode(msgspec.msgpack.encode(wrong))


def test_parameters_out_of_range_are_refused_on_the_way_too():
    sent = messages.AddRequest("a", [1], SamplingParams(), 4, [], 0, 0.0)
    raw = msgspec.msgpack.decode(encode(sent))
    raw[1]["params"]["top_p"] = 7.0
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        decode(msgspec.msgpack.encode(raw))
