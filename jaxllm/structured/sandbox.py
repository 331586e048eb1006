"""Where grammars are tried first: a process that a hostile one may exhaust, hang or crash.

`python -m jaxllm.structured.sandbox FD`, where FD is its end of a socket pair. It gets a `Vocabulary`, then requests'
`StructuredOutputsParams`, and answers each with a `Verdict`.
"""

import dataclasses
import json
import os
import resource
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

import msgspec

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.structured.grammar import limits, to_llguidance
from jaxllm.structured.structural_tag import named_parts
from jaxllm.structured.vocabulary import Vocabulary, llguidance_tokenizer

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 30  # beside what the sandbox itself takes
START_SECONDS = 60.0  # for the process and its trie of tokens


@dataclasses.dataclass(slots=True)
class Verdict:
    """What became of a grammar: its text for llguidance, or why it is refused; and the part of it at fault, where that
    has a name of its own, with its value."""

    grammar: str = ""
    error: str = ""
    field: str = ""
    value: str = ""


class SandboxError(Exception):
    """A grammar used up its time or its memory, and the sandbox with it."""


class Sandbox:
    """A sandbox as its owner sees it; not for several threads at once."""

    def __init__(self, vocabulary: Vocabulary):
        """Starts it. Raises RuntimeError if it does not come up."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "jaxllm.structured.sandbox", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._connection = Connection(ours.detach())
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(vocabulary))
            started = self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == b"ready"
        except (OSError, EOFError):
            started = False
        if not started:
            self.close()
            raise RuntimeError("the sandbox for grammars does not start")

    def try_out(self, params: StructuredOutputsParams) -> Verdict:
        """Compiles a grammar and computes its first mask. Raises SandboxError; then the sandbox is gone."""
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(params))
            if self._connection.poll(MAX_SECONDS):
                return msgspec.msgpack.decode(self._connection.recv_bytes(), type=Verdict)
            reason = f"takes more than {MAX_SECONDS:g} s to compile"
        except (OSError, EOFError):
            reason = f"takes more than {MAX_BYTES >> 20} MiB to compile, or nests too deeply"
        self.close()
        raise SandboxError(reason)

    @property
    def alive(self) -> bool:
        """Whether it can try out another grammar."""
        return self._process.poll() is None and not self._connection.closed

    def kill(self) -> None:
        """Makes `try_out` on another thread raise SandboxError."""
        self._process.kill()

    def close(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def main() -> None:
    """Answers until the owner is gone."""
    connection = Connection(int(sys.argv[1]))
    try:
        tokenizer = llguidance_tokenizer(msgspec.msgpack.decode(connection.recv_bytes(), type=Vocabulary))
        _limit_memory()
        connection.send_bytes(b"ready")
        while True:
            params = msgspec.msgpack.decode(connection.recv_bytes(), type=StructuredOutputsParams)
            _limit_time()
            connection.send_bytes(msgspec.msgpack.encode(_verdict(tokenizer, params)))
    except (EOFError, OSError):
        pass


def _limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, taken + MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    """Ends the process if it computes on when its owner, who would kill it, has died."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime + 2 * MAX_SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _verdict(tokenizer, params: StructuredOutputsParams) -> Verdict:
    try:
        grammar = to_llguidance(params)
    except InvalidRequestError as error:
        named = "" if error.field.startswith("structured_outputs") else error.field
        return Verdict(error=error.limit, field=named, value=repr(error.value))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError) as error:
        return Verdict(error=str(error) or type(error).__name__)
    fault = _error_of(tokenizer, grammar)
    if not fault:
        return Verdict(grammar)
    if params.structural_tag is not None:
        for field, value, part in named_parts(json.loads(params.structural_tag)):
            if own := _error_of(tokenizer, part):
                return Verdict(error=own, field=field, value=repr(value))
    return Verdict(error=fault)


def _error_of(tokenizer, grammar: str) -> str:
    """Why a grammar cannot be used; empty if it can."""
    import llguidance

    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error() if matcher.is_error() else ""


if __name__ == "__main__":
    main()
