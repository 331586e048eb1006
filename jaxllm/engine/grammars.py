"""The requests under a grammar: those whose grammar is being compiled, and what the others allow in a step."""

import collections
import concurrent.futures
import dataclasses
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.core.request import Request
from jaxllm.engine.sampling import mask_words
from jaxllm.errors import InvalidRequestError
from jaxllm.structured.compiler import GrammarCompiler, LoadVocabulary
from jaxllm.structured.matcher import Masks, Matcher

if TYPE_CHECKING:
    from jaxllm.engine.core import Arrival

PATIENCE = 0.002  # seconds that an engine with nothing else to do waits for a compilation before it looks around


@dataclasses.dataclass(slots=True)
class StepMasks:
    """What grammars allow in a step, of each rank, padded to a rung of rows.

    Attributes:
      slots: int32[ranks, M], those of the requests; past the last for padding.
      words: int32[ranks, M, W], see `jaxllm.engine.sampling.apply_grammar_mask`.
    """

    slots: np.ndarray
    words: np.ndarray

    def allowed(self, rank: int, slot: int) -> np.ndarray | None:
        """bool[32 W]: which tokens the request of that slot may choose; None for one without a grammar."""
        at = np.flatnonzero(self.slots[rank] == slot)
        if not len(at):
            return None
        return np.unpackbits(self.words[rank, at[0]].astype("<i4").view(np.uint8), bitorder="little").astype(bool)


class Grammars:
    """Follows the outputs that have a grammar. All but the compilation happens on the caller's thread.

    Args:
      load_vocabulary: see `GrammarCompiler`.
      vocab_size: logits a row.
      num_slots: of each rank.
      rungs: row counts that masks are padded to, ascending; the last one holds all slots.
    """

    def __init__(self, load_vocabulary: LoadVocabulary, vocab_size: int, num_slots: int, rungs: Sequence[int]):
        self._compiler = GrammarCompiler(load_vocabulary)
        self._words, self._num_slots, self._rungs = mask_words(vocab_size), num_slots, rungs
        self._held: collections.OrderedDict[str, tuple[Arrival, Future]] = collections.OrderedDict()
        self._matchers: dict[str, Matcher] = {}
        self._masks: Masks | None = None

    # Compilation

    def prepare(self) -> None:
        """Begins with what the first grammar would wait for, on a thread."""
        self._compiler.prepare()

    def hold(self, arrival: "Arrival") -> None:
        """Keeps a request until its grammar is compiled. Raises QueueFullError."""
        params = arrival.request.params.structured_outputs
        assert params is not None
        self._held[arrival.request.id] = arrival, self._compiler.compile(params)

    @property
    def num_held(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._held)

    def release(self, idle: bool) -> list[tuple["Arrival", Exception | None]]:
        """The requests whose grammar is compiled, or refused, in their order; the former have a matcher from now on.

        idle: wait a moment if there is none.
        """
        if not self._held:
            return []
        if idle:
            futures = [future for _, future in self._held.values()]
            concurrent.futures.wait(futures, PATIENCE, concurrent.futures.FIRST_COMPLETED)
        done: list[tuple[Arrival, Exception | None]] = []
        for name, (arrival, future) in list(self._held.items()):
            if future.done():
                del self._held[name]
                done.append((arrival, self._start(arrival.request, future)))
        return done

    def _start(self, request: Request, future: Future) -> Exception | None:
        """Gives a request its matcher, or tells why not."""
        try:
            matcher = Matcher(future.result())
        except Exception as error:
            return error
        emitted = request.tokens[request.num_prompt_tokens :]
        matcher.follow(request.tokens, request.num_prompt_tokens)
        if matcher.error is not None:
            return InvalidRequestError("output_token_ids", emitted, matcher.error)
        self._matchers[request.id] = matcher
        return None

    def forget(self, request_id: str) -> bool:
        """Drops what is known of a request that has ended; whether it was still held."""
        self._matchers.pop(request_id, None)
        return self._held.pop(request_id, None) is not None

    # Steps

    def constrain(self, batches: Sequence[Batch | None]) -> bool:
        """Whether a row samples under a grammar, so that its last token has to be read before."""
        if not self._matchers:
            return False
        return any(row.samples and row.request.id in self._matchers for batch in batches if batch for row in batch.rows)

    def masks(self, batches: Sequence[Batch | None]) -> tuple[StepMasks, list[tuple[Request, str]]]:
        """What the step's rows under a grammar allow, now that all their tokens are known; and the requests whose
        grammar cannot go on, with the reason."""
        if self._masks is None:
            self._masks = Masks()
        found: list[list[tuple[int, Request, Matcher]]] = []
        for batch in batches:
            found.append([])
            for row in batch.rows if batch else ():
                request = row.request
                matcher = self._matchers.get(request.id) if row.samples else None
                if matcher is not None and not request.status.ended:
                    matcher.follow(request.tokens, request.num_prompt_tokens)
                    found[-1].append((row.slot, request, matcher))
        rung = self._rungs[bisect_left(self._rungs, max(map(len, found)))]
        slots = np.full((len(found), rung), self._num_slots, np.int32)
        words = np.zeros((len(found), rung, self._words), np.int32)
        failed = []
        for rank, entries in enumerate(found):
            if entries:
                slots[rank, : len(entries)] = [slot for slot, _, _ in entries]
                self._masks.fill([matcher for _, _, matcher in entries], words[rank])
                failed += [(request, matcher.error) for _, request, matcher in entries if matcher.error is not None]
        return StepMasks(slots, words), failed

    def close(self) -> None:
        """Stops compiling."""
        self._compiler.close()
