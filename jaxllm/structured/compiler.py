"""Compiles grammars on threads of its own: first in a sandbox, then here, where their masks are computed."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError, QueueFullError, Shown
from jaxllm.structured.grammar import limits
from jaxllm.structured.sandbox import Sandbox, SandboxError
from jaxllm.structured.vocabulary import Encode, Vocabulary, llguidance_tokenizer

if TYPE_CHECKING:
    import llguidance

logger = logging.getLogger(__name__)

LoadVocabulary = Callable[[], tuple[Vocabulary, Encode | None]]

NUM_SANDBOXES = 2
MAX_CACHED = 128
MAX_PENDING = 256


class TooCostlyError(InvalidRequestError):
    """A refusal that a machine less busy might not repeat."""


class GrammarCompiler:
    """Grammars by what was asked for; the most recently used ones are kept.

    Args:
      load_vocabulary: called once, on a thread, when the first grammar is asked for.
    """

    def __init__(self, load_vocabulary: LoadVocabulary):
        self._load_vocabulary = load_vocabulary
        self._pool = ThreadPoolExecutor(NUM_SANDBOXES, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._vocabulary: tuple[Vocabulary, Any] | None = None
        self._cache: OrderedDict[bytes, Future] = OrderedDict()
        self._pending: dict[bytes, Future] = {}
        self._idle: list[Sandbox] = []
        self._busy: set[Sandbox] = set()
        self._closed = False
        self.num_compiled = 0

    def prepare(self) -> None:
        """Begins with what the first grammar would wait for, on a thread: the vocabulary, and a sandbox."""
        self._pool.submit(self._prepare)

    def _prepare(self) -> None:
        try:
            vocabulary, _ = self._tokens()
            with self._lock:
                needed = not (self._idle or self._busy or self._closed)
            if needed:
                self._give_back(self._take(vocabulary))
        except Exception as error:  # a request under a grammar gets to know, if there is one
            logger.debug("no grammars: %s: %s", type(error).__name__, error)

    def compile(self, params: StructuredOutputsParams) -> "Future[llguidance.LLMatcher]":
        """A matcher at the grammar's start, to be copied and never walked itself.

        The future raises InvalidRequestError for what is refused. Raises QueueFullError if too many are under way.
        """
        key = msgspec.msgpack.encode(params)
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                return found
            found = self._pending.get(key)
            if found is None:
                if len(self._pending) >= MAX_PENDING:
                    raise QueueFullError(f"{len(self._pending)} grammars wait to be compiled, at most {MAX_PENDING}")
                found = self._pending[key] = self._pool.submit(self._compile, params)
                found.add_done_callback(lambda future: self._keep(key, future))
            return found

    def _keep(self, key: bytes, future: Future) -> None:
        """Refusals are kept too."""
        error = None if future.cancelled() else future.exception()
        with self._lock:
            self._pending.pop(key, None)
            if future.cancelled() or isinstance(error, TooCostlyError):
                return
            if error is not None and not isinstance(error, InvalidRequestError):
                return
            self._cache[key] = future
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)

    def _compile(self, params: StructuredOutputsParams) -> "llguidance.LLMatcher":
        import llguidance

        field, value = f"structured_outputs.{params.kind}", getattr(params, params.kind)
        vocabulary, tokenizer = self._tokens()
        sandbox = self._take(vocabulary)
        try:
            verdict = sandbox.try_out(params)
        except SandboxError as error:
            raise TooCostlyError(field, value, str(error)) from None
        finally:
            self._give_back(sandbox)
        if verdict.error:
            raise InvalidRequestError(verdict.field or field, Shown(verdict.value) or value, verdict.error)
        matcher = llguidance.LLMatcher(tokenizer, verdict.grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise InvalidRequestError(field, value, matcher.get_error())
        self.num_compiled += 1
        return matcher

    def _tokens(self) -> tuple[Vocabulary, Any]:
        with self._loading:
            if self._vocabulary is None:
                vocabulary, encode = self._load_vocabulary()
                self._vocabulary = vocabulary, llguidance_tokenizer(vocabulary, encode)
            return self._vocabulary

    def _take(self, vocabulary: Vocabulary) -> Sandbox:
        with self._lock:
            if self._idle:
                self._busy.add(sandbox := self._idle.pop())
                return sandbox
        sandbox = Sandbox(vocabulary)
        with self._lock:
            self._busy.add(sandbox)
            if self._closed:
                sandbox.kill()
        return sandbox

    def _give_back(self, sandbox: Sandbox) -> None:
        with self._lock:
            self._busy.discard(sandbox)
            if sandbox.alive and not self._closed:
                self._idle.append(sandbox)
                return
        sandbox.close()

    def close(self) -> None:
        """Ends the sandboxes; what is under way fails."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for sandbox in self._busy:
                sandbox.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for sandbox in idle:
            sandbox.close()
