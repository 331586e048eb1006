"""The engine core: schedulers and a runner, folded over steps so that the host never waits for the device's last one.

pending = launch(schedule()); finish(previous); previous = pending
"""

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.core.batch import Batch
from jaxllm.core.kv_cache import KVCache
from jaxllm.core.request import FINISH_REASONS, Request, Status
from jaxllm.core.scheduler import Scheduler, Update
from jaxllm.engine.executables import warm_up_order
from jaxllm.engine.figures import StepFigures
from jaxllm.engine.grammars import Grammars
from jaxllm.engine.messages import (
    AddRequest,
    Finish,
    Logprobs,
    Ready,
    SequenceOutput,
    StepOutputs,
    ToCore,
    Utility,
    UtilityResult,
)
from jaxllm.engine.recovery import CulpritSearch
from jaxllm.engine.results import RowDetail, StepResult, TokenLogprobs
from jaxllm.engine.runner import Launched, Runner
from jaxllm.errors import NO_TOKEN, EngineDeadError, InvalidRequestError, QueueFullError
from jaxllm.structured.compiler import LoadVocabulary

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Arrival:
    """A request made ready for the scheduler outside the loop over steps, see `EngineCore.prepare`."""

    message: AddRequest
    request: Request


class EngineCore:
    """Serves messages: `handle` takes one in, `step` runs the engine once and returns what came of it.

    Each data-parallel rank has a scheduler and a cache of its own; all ranks step together.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        enable_prefix_caching: bool = True,
        warm_up: bool = True,
        load_vocabulary: LoadVocabulary | None = None,
    ):
        self.runner = runner
        plan = runner.plan
        self.schedulers = [
            Scheduler(plan.scheduler, KVCache(plan.groups, enable_prefix_caching)) for _ in range(runner.num_ranks)
        ]
        self._grammars: Grammars | None = None
        if load_vocabulary is not None:
            slots = plan.scheduler.max_num_seqs
            self._grammars = Grammars(load_vocabulary, runner.vocab_size, slots, runner.row_rungs)
        self._rank_of: dict[str, int] = {}
        self._bad_words: dict[str, list[list[int]]] = {}
        self._prompt_logprobs: dict[str, dict[int, Logprobs]] = {}
        self._previous: Launched | None = None
        self._launched_at = 0.0  # the previous step
        self._figures = StepFigures()
        self._search = CulpritSearch()
        self._outbox: list[SequenceOutput | UtilityResult] = []
        self._ids: list[str] = []  # see StepOutputs
        self._tokens: list[int] = []
        self._warm_up = warm_up
        self._warming_up = False

    # Messages

    def ready(self) -> Ready:
        """What clients need to know."""
        plan = self.runner.plan
        tokens = min((group.num_pages - 1) * group.page_size for group in plan.groups)
        return Ready(plan.scheduler.max_model_len, self.runner.vocab_size, plan.scheduler.max_num_seqs, tokens)

    def prepare(self, message: ToCore) -> ToCore | Arrival:
        """What of `handle` needs no order and may be done on another thread, while a step runs: hashing a prompt."""
        if not isinstance(message, AddRequest):
            return message
        arrival = Arrival(message, _request(message))
        self.schedulers[0].kv_cache.name_pages(arrival.request)  # the same in every rank's cache
        return arrival

    def handle(self, message: ToCore | Arrival) -> None:
        """Takes one message in; answers and refusals come with the next `step`."""
        if isinstance(message, AddRequest):
            message = Arrival(message, _request(message))
        if isinstance(message, Arrival):
            try:
                if message.request.params.structured_outputs is None:
                    self._add(message.message, message.request)
                elif self._grammars is None:
                    raise InvalidRequestError("structured_outputs", "", "this model has no tokenizer")
                else:
                    self._grammars.hold(message)
            except (InvalidRequestError, QueueFullError) as error:
                self._refuse(message.request.id, error)
        elif isinstance(message, Finish):
            status = Status.STOPPED if message.reason == "stop" else Status.ABORTED
            for request_id in message.ids:
                self._finish(request_id, status)
        else:
            self._outbox.append(self._call(message))

    def _refuse(self, request_id: str, error: Exception) -> None:
        output = SequenceOutput(request_id, [], finish_reason="error", error=str(error))
        if isinstance(error, InvalidRequestError):
            output.refused = (error.field, repr(error.value), error.limit)
        output.queue_full = isinstance(error, QueueFullError)
        self._outbox.append(output)

    def _add_compiled(self, idle: bool) -> None:
        """Adds the requests whose grammar has been compiled by now. idle: there is nothing else to do."""
        for arrival, error in self._grammars.release(idle) if self._grammars is not None else ():
            try:
                if error is not None:
                    raise error
                self._add(arrival.message, arrival.request)
            except (InvalidRequestError, QueueFullError) as refusal:
                self._forget(arrival.request.id)
                self._refuse(arrival.request.id, refusal)
            except Exception as failure:
                logger.exception("the grammar of request %s", arrival.request.id)
                self._refuse(arrival.request.id, failure)

    def _add(self, message: AddRequest, request: Request) -> None:
        rank = self._choose_rank(message)
        self.schedulers[rank].add(request, message.admitted)
        self._rank_of[message.id] = rank
        if message.bad_words:
            self._bad_words[message.id] = message.bad_words
        if message.params.prompt_logprobs is not None:
            self._prompt_logprobs[message.id] = {}

    def _choose_rank(self, message: AddRequest) -> int:
        """A follower joins its leader; others go where the prompts are shortest, all told."""
        if message.leader in self._rank_of:
            return self._rank_of[message.leader]
        loads = [scheduler.num_prompt_tokens for scheduler in self.schedulers]
        return loads.index(min(loads))

    def _finish(self, request_id: str, status: Status) -> None:
        rank = self._rank_of.get(request_id)
        if rank is None:
            if self._grammars is not None and self._grammars.forget(request_id) and status is not Status.STOPPED:
                self._outbox.append(SequenceOutput(request_id, [], finish_reason=FINISH_REASONS[status]))
            return
        update = self.schedulers[rank].finish_request(request_id, status)
        self._forget(request_id)
        if update is not None and status is not Status.STOPPED:
            self._outbox.append(SequenceOutput(request_id, [], finish_reason=FINISH_REASONS[status]))

    def _forget(self, request_id: str) -> None:
        self._rank_of.pop(request_id, None)
        self._bad_words.pop(request_id, None)
        self._prompt_logprobs.pop(request_id, None)
        if self._grammars is not None:
            self._grammars.forget(request_id)

    def _call(self, message: Utility) -> UtilityResult:
        try:
            return UtilityResult(message.call, value=getattr(self, f"utility_{message.name}")())
        except Exception as error:
            logger.exception("utility %s", message.name)
            return UtilityResult(message.call, error=f"{type(error).__name__}: {error}")

    # Utilities

    @property
    def compiling(self) -> bool:
        """Whether the loop waits for a compilation: it may take minutes, and is no sign of a fault. For any thread."""
        return self._warming_up or self.runner.executables.num_waiting > 0

    def utility_ping(self) -> None:
        """Answers."""

    def utility_stats(self) -> dict[str, Any]:
        """Figures for metrics and tests."""
        runner, schedulers = self.runner, self.schedulers
        queried = sum(s.kv_cache.num_queried_tokens for s in schedulers)
        return {
            "running": sum(s.num_running for s in schedulers),
            "waiting": sum(s.num_waiting for s in schedulers),
            "cache_usage": max(s.kv_cache.usage for s in schedulers),
            "prefix_queried_tokens": queried,
            "prefix_hit_tokens": sum(s.kv_cache.num_hit_tokens for s in schedulers),
            "preemptions": sum(s.num_preemptions for s in schedulers),
            "steps": runner.num_steps,
            "scheduled_tokens": runner.num_scheduled_tokens,
            "padded_tokens": runner.num_padded_tokens,
            "late_compilations": runner.executables.num_late,
            "step_seconds": self._figures.seconds.json(),
            "step_tokens": self._figures.tokens.json(),
            "host_seconds": self._figures.host_seconds,
            "launch_seconds": runner.seconds_launching,
        }

    def utility_reset_prefix_cache(self) -> None:
        """Forgets cached prefixes."""
        for scheduler in self.schedulers:
            scheduler.kv_cache.reset_prefix_cache()

    def utility_warm_up(self) -> int:
        """Compiles all that serving may meet, waits for it and runs it once; how many executables there are."""
        keys = warm_up_order(self.runner.plan)
        self._warming_up = True
        try:
            self.runner.device.compile(keys)
            self.runner.rehearse()
            if self._grammars is not None:
                self._grammars.prepare()
        finally:
            self._warming_up = False
        return len(keys)

    # Steps

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._outbox or self._previous or self._scheduled or self._compiling)

    @property
    def _scheduled(self) -> bool:
        return any(scheduler.has_work for scheduler in self.schedulers)

    @property
    def _compiling(self) -> bool:
        return self._grammars is not None and self._grammars.num_held > 0

    def step(self) -> list[StepOutputs | UtilityResult]:
        """Launches the next step, then reads the one before. May return nothing while the pipeline fills.

        A step with rows under a grammar computes like any other, but samples only when the step before it has been
        read: their masks are filled while the device computes.
        """
        begin, waited = time.perf_counter(), self.runner.seconds_waited
        messages = self._step()
        self._figures.host_seconds += time.perf_counter() - begin - (self.runner.seconds_waited - waited)
        return messages

    def _step(self) -> list[StepOutputs | UtilityResult]:
        self._add_compiled(idle=not (self._outbox or self._previous or self._scheduled))
        if self._search.advance():
            for scheduler in self.schedulers:
                scheduler.restrict(self._search.trial)
        now = time.monotonic()
        batches = [scheduler.schedule(now) for scheduler in self.schedulers]
        hold = self._grammars is not None and self._grammars.constrain(batches)
        try:
            launched = self.runner.launch(batches, self._bad_words, hold) if any(batches) else None
        except Exception as error:
            self._recover(batches, error)
            return self._drain()
        if launched is not None and self._warm_up:
            self._warm_up = False  # after the first step has what it needs
            self.runner.device.prepare(warm_up_order(self.runner.plan))
        previous, self._previous = self._previous, launched
        launched_at, self._launched_at = self._launched_at, now
        if previous is not None:
            try:
                results = self.runner.read(previous)
            except Exception as error:
                self._recover(previous.batches, error)
                return self._drain()
            self._figures.read(launched_at, sum(batch.num_tokens for batch in previous.batches if batch is not None))
            self._search.step_passed()
            self._take(previous, results)
        messages = self._drain()
        if launched is not None and hold:
            self._sample_held(launched)
        return messages

    def _sample_held(self, launched: Launched) -> None:
        """Masks and samples a step, all tokens before it being known. What it has to tell comes with the next step."""
        assert self._grammars is not None
        masks, failed = self._grammars.masks(launched.batches)
        for request, error in failed:
            self._fail(request.id, error)
        try:
            self.runner.sample(launched, masks)
        except Exception as error:
            self._recover(launched.batches, error)

    def _recover(self, batches: Sequence[Batch | None], error: Exception) -> None:
        """A step has raised, and the caches that it was given are lost: recomputes everything, and finds whose fault it
        was. Raises the error if it is nobody's."""
        if isinstance(error, EngineDeadError):  # another process is lost
            raise error
        try:
            culprit = self._search.step_failed(row.request for batch in batches if batch for row in batch.rows)
        except LookupError as reason:
            raise error from reason
        text = "".join(traceback.format_exception(error))
        logger.warning("a step has failed: everything under way is recomputed\n%s", text)
        # The frames that it went through may hold the old caches, and there is no room for two.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self._previous = None
        self.runner.device.reset()
        for scheduler in self.schedulers:
            scheduler.recompute_all()
        if culprit is not None:
            self._fail(culprit.id, f"the steps that it is in fail: {type(error).__name__}: {error}")

    def _take(self, launched: Launched, results: list[StepResult]) -> None:
        for scheduler, batch, result in zip(self.schedulers, launched.batches, results, strict=True):
            if batch is None:
                continue
            by_id = {}
            for index, detail in result.details.items():
                request = batch.rows[index].request
                if scheduler.requests.get(request.id) is not request:
                    continue  # it has ended meanwhile; the id may be another request's by now
                if not detail.finite:
                    self._fail(request.id, NO_TOKEN)
                else:
                    by_id[request.id] = detail
                    self._collect(request, detail)
            progress = scheduler.finish(batch, result.tokens)
            self._ids += [request.id for request in progress.requests]
            self._tokens += progress.tokens
            for update in progress.updates:
                self._outbox.append(self._output(update, by_id.get(update.request.id)))
                if update.ended:
                    self._forget(update.request.id)

    def _fail(self, request_id: str, error: str) -> None:
        self.schedulers[self._rank_of[request_id]].finish_request(request_id, Status.ERROR)
        self._forget(request_id)
        logger.warning("request %s: %s", request_id, error)
        self._outbox.append(SequenceOutput(request_id, [], finish_reason="error", error=error))

    def _collect(self, request: Request, result: RowDetail) -> None:
        collected = self._prompt_logprobs.get(request.id)
        if collected is not None:
            for position, entry in result.prompt_logprobs:
                collected[position] = _logprobs(request.tokens[position], entry)

    def _output(self, update: Update, result: RowDetail | None) -> SequenceOutput:
        request = update.request
        output = SequenceOutput(request.id, update.new_tokens, num_cached_tokens=request.num_cached)
        output.queue_time = request.first_scheduled - request.arrival
        if result is not None and result.logprobs:
            pairs = zip(update.new_tokens, result.logprobs, strict=False)
            output.logprobs = [_logprobs(token, entry) for token, entry in pairs]
        if result is not None and result.embedding is not None:
            output.embedding = result.embedding.tobytes()
        collected = self._prompt_logprobs.pop(request.id, None)
        if collected is not None:
            output.prompt_logprobs = [collected[position] for position in range(1, request.num_prompt_tokens)]
        if update.ended:
            output.finish_reason = FINISH_REASONS[update.status]
            output.stop_token = request.stop_token
        return output

    def _drain(self) -> list[StepOutputs | UtilityResult]:
        outbox, self._outbox = self._outbox, []
        outputs = [message for message in outbox if isinstance(message, SequenceOutput)]
        others = [message for message in outbox if isinstance(message, UtilityResult)]
        ids, self._ids = self._ids, []
        tokens, self._tokens = self._tokens, []
        return [*others, StepOutputs(outputs, ids, tokens)] if outputs or ids else list(others)

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        """See `Device.watch`."""
        self.runner.device.watch(on_lost)

    def close(self, reason: str | None = None) -> None:
        """Stops compiling, and ends other processes that step with this one: as it should be, or for a reason."""
        if self._grammars is not None:
            self._grammars.close()
        self.runner.device.close(reason)


def _request(message: AddRequest) -> Request:
    return Request(
        id=message.id,
        tokens=message.prompt_token_ids + message.output_token_ids,
        num_prompt_tokens=len(message.prompt_token_ids),
        params=message.params,
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        seed=message.seed,
        priority=message.priority,
        arrival=message.arrival,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
        leader=message.leader,
        pooling=message.pooling,
    )


def _logprobs(token: int, entry: TokenLogprobs) -> Logprobs:
    return Logprobs(token, entry.logprob, entry.rank, entry.top_ids, entry.top_logprobs)
