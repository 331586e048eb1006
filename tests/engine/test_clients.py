"""The core in a process of its own: the same tokens, no deadlock, no process left behind, typed errors."""

import os
import signal
import threading
import time

import pytest

from jaxllm import SamplingParams
from jaxllm.engine.messages import Finish
from jaxllm.errors import ConfigError, EngineDeadError, InvalidRequestError, OutOfMemoryError
from tests.engine import tiny


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def send_much(client) -> None:
    """A few megabytes to the core."""
    for _ in range(100):
        client.send(Finish(["nobody by this name"] * 2000))


def test_an_engine_process(checkpoint, truth):
    """One process for many claims: starting one takes seconds."""
    work, alone = truth("llama")
    with tiny.llm(checkpoint("llama"), engine_process=True) as llm:
        pid = llm._client.pid  # type: ignore[attr-defined]
        found = llm.generate([prompt for prompt, _ in work], [params for _, params in work])
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in alone]
        assert [o.outputs[0].text for o in found] == [o.outputs[0].text for o in alone]
        assert llm.stats()["steps"] > 20 and llm.max_model_len == 128

        # logprobs of everything, n samples, stop strings and resumption cross the boundary too
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, prompt_logprobs=1, n=2, seed=2**64 - 1)
        output = llm.generate(work[0][0], params)[0]
        assert len(output.outputs[1].logprobs[0]) == tiny.VOCAB and len(output.prompt_logprobs) == len(work[0][0])
        tokens = alone[0].outputs[0].token_ids
        resumed = list(llm.stream(*work[0], output_token_ids=tokens[:2]))
        assert [token for delta in resumed for token in delta.token_ids] == tokens[2:]

        # a refusal at the door, another by the core
        with pytest.raises(InvalidRequestError, match="temperature"):
            llm.generate([5], SamplingParams(temperature=-1))
        with pytest.raises(RuntimeError, match="no_such"):
            llm._call("no_such")

        # more of each way than the pipes hold, sent before anything is read
        large = SamplingParams(max_tokens=1, prompt_logprobs=-1)
        for _ in range(2):  # the second time nothing has to be compiled, and a second is enough
            collector = llm._submit(llm._builder.build([5] * 120, large))
            time.sleep(1)
            sender = threading.Thread(target=send_much, args=(llm._client,), daemon=True)
            sender.start()
            sender.join(timeout=30)
            assert not sender.is_alive(), "both sides wait for the other to read"
            while not collector.output.finished:
                llm._receive()
        many = llm.generate([[5 + i % 50] * 100 for i in range(1000)], SamplingParams(max_tokens=1, logprobs=20))
        assert len(many) == 1000 and all(len(output.outputs[0].token_ids) == 1 for output in many)
        assert alive(pid)
    assert not alive(pid)
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([5], SamplingParams(max_tokens=1))


def test_a_killed_process_is_an_error_not_a_hang(checkpoint):
    with tiny.llm(checkpoint("llama"), engine_process=True, max_engine_restarts=0) as llm:
        pid = llm._client.pid  # type: ignore[attr-defined]
        stream = llm.stream([5, 6], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        next(stream)
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        for use in (lambda: list(stream), lambda: llm.generate([5]), llm.stats):
            with pytest.raises(EngineDeadError, match="ended"):
                use()
        assert time.monotonic() - begin < 5
    assert not alive(pid)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_model_len": 129}, ConfigError, "max_model_len=129: the model's limit is 128"),
        ({"kv_cache_memory_bytes": 5000}, OutOfMemoryError, "kv_cache_memory_bytes"),
    ],
)
def test_the_cores_errors_at_start_keep_their_types(checkpoint, options, error, match):
    with pytest.raises(error, match=match):
        tiny.llm(checkpoint("llama"), engine_process=True, **({"max_model_len": 128} | options))
