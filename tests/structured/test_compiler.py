"""Compilation: cached, bounded, and at the cost of its own request."""

import contextlib
import os
import signal
import time
from concurrent.futures import CancelledError

import pytest

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError, QueueFullError
from jaxllm.structured import compiler as module
from jaxllm.structured import sandbox
from jaxllm.structured.compiler import GrammarCompiler, TooCostlyError

GOOD = StructuredOutputsParams(regex="ab*")


def refusal(compiler, **asked) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        compiler.compile(StructuredOutputsParams(**asked).checked()).result(timeout=60)
    assert caught.value.field == f"structured_outputs.{next(iter(asked))}"
    return caught.value.limit


def deep(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreference"),
        ({"regex": "(((("}, "unclosed group"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "this is no grammar"}, ""),
        ({"json": {"type": "nope"}}, "nope"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "object", "if": {}, "then": False}}, "if"),
        ({"json": {"$ref": "https://example.com/schema"}}, "does not fetch"),
        ({"json": False}, ""),
        ({"json": deep(500)}, "recursion"),
        ({"structural_tag": '{"structures": [], "triggers": []}'}, "at least one structure"),
        ({"structural_tag": '{"type": "structural_tag", "format": {}}'}, "type None is none of const_string"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_enforced_is_refused_with_the_reason(compiler, asked, reason):
    if asked.get("json") is False:
        asked = {"json": "false"}
    assert reason in refusal(compiler, **asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(a|a)*" * 200 + "b"},
        {"regex": "(.*a){300}[a-z]{1,5000}"},
        {"regex": "(((a{0,200}){0,200}){0,200}){0,200}"},
        {"regex": "[^a]*a.{20}" * 20},
        {"json": {"enum": [f"{i:x}{'the' * (i % 40)}" for i in range(8000)]}},
        {"json": {"anyOf": [{"properties": {f"p{i}": {"type": "string"}}} for i in range(300)]}},
        {"json": {"type": "string", "pattern": "^(a+)+(b+)+$", "maxLength": 100000}},
        {"json": {"type": "array", "minItems": 10**6, "items": {"type": "array", "minItems": 10**6}}},
        {
            "grammar": "start: a a\n"
            + "".join(f"{c}: {d} {d} {d} {d}\n" for c, d in zip("abcdefghij", "bcdefghijk"))
            + 'k: "x"?\n'
        },
        {"choice": [f"choice number {i}" for i in range(10_000)]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_hostile_grammar_ends_in_time(compiler, asked):
    """Compiled or refused: either way soon, and the next one is served."""
    begin = time.monotonic()
    with contextlib.suppress(InvalidRequestError):
        compiler.compile(StructuredOutputsParams(**asked).checked()).result(timeout=60)
    assert time.monotonic() - begin < 3 * sandbox.MAX_SECONDS  # on a busy machine
    assert compiler.compile(GOOD).result(timeout=60) is not None


def test_equal_requests_share_a_grammar(compiler):
    before = compiler.num_compiled
    futures = [compiler.compile(StructuredOutputsParams(json={"enum": ["once"]}).checked()) for _ in range(5)]
    assert len({id(future.result()) for future in futures}) == 1 and compiler.num_compiled == before + 1


def test_the_cache_and_the_queue_are_bounded(vocabulary, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED", 3)
    monkeypatch.setattr(module, "MAX_PENDING", 4)
    compiler = GrammarCompiler(lambda: (vocabulary, None))
    asked = [StructuredOutputsParams(regex=f"a{{{i}}}") for i in range(1, 6)]
    futures = [compiler.compile(params) for params in asked[:4]]
    with pytest.raises(QueueFullError):
        compiler.compile(asked[4])
    for future in futures:
        future.result(timeout=60)
    deadline = time.monotonic() + 60
    while compiler._pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(compiler._cache) == 3 and compiler.num_compiled == 4
    compiler.compile(asked[3]).result(timeout=60)
    assert compiler.num_compiled == 4
    compiler.close()


def test_a_sandbox_out_of_time_or_memory_is_replaced(vocabulary, monkeypatch):
    """Stopped and starved sandboxes stand for grammars that would do this to them."""
    compiler = GrammarCompiler(lambda: (vocabulary, None))
    compiler.compile(GOOD).result(timeout=60)
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    (first,) = compiler._idle
    os.kill(first._process.pid, signal.SIGSTOP)
    with pytest.raises(TooCostlyError, match=r"takes more than 0\.3 s"):
        compiler.compile(StructuredOutputsParams(regex="x")).result(timeout=60)
    assert not first.alive
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 30.0)
    compiler.compile(StructuredOutputsParams(regex="x")).result(timeout=60)  # such a refusal is not kept
    (second,) = compiler._idle
    second._process.kill()
    second._process.wait()
    compiler._idle = [second]
    with pytest.raises(TooCostlyError, match="MiB"):
        compiler.compile(StructuredOutputsParams(regex="y")).result(timeout=60)
    compiler.compile(StructuredOutputsParams(regex="y")).result(timeout=60)
    compiler.close()
    assert all(not one.alive for one in [first, second, *compiler._idle])


def test_closing_ends_what_is_under_way(vocabulary):
    compiler = GrammarCompiler(lambda: (vocabulary, None))
    compiler.compile(GOOD).result(timeout=60)
    (idle,) = compiler._idle
    futures = [compiler.compile(StructuredOutputsParams(regex=f"b{{{i}}}")) for i in range(1, 20)]
    compiler.close()
    for future in futures:
        with contextlib.suppress(InvalidRequestError, CancelledError, RuntimeError):
            future.result(timeout=60)
    assert not compiler._busy and not compiler._idle and not idle.alive
