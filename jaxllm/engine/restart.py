"""A core in a process of its own, and another one when it dies: requests go on where they stood."""

import collections
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from jaxllm.engine.ledger import Ledger
from jaxllm.engine.messages import (
    AddRequest,
    Finish,
    FromCore,
    Ready,
    SequenceOutput,
    StepOutputs,
    ToCore,
    Utility,
    UtilityResult,
)
from jaxllm.errors import EngineDeadError, JaxllmError

logger = logging.getLogger(__name__)
PING = -1  # `call` of the utility that asks whether the core is alive
LONGEST_PAUSE = 30.0  # seconds before a start that follows failed ones; the first such pause is a second


class Core(Protocol):
    """What is restarted: see `jaxllm.engine.client.CoreProcess`."""

    ready: Ready
    pid: int

    def wait(self, timeout: float | None) -> bool: ...

    def send(self, message: ToCore) -> None: ...

    def receive(self, timeout: float) -> list[FromCore]: ...

    def close(self) -> None: ...

    def bury(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class RestartPolicy:
    """When a core counts as dead, and how often it gets a successor.

    Attributes:
      most: restarts within `window`; one more death ends the client.
      window: seconds.
      silence: seconds without a sign of life after which a core is killed; None: never.
    """

    most: int
    window: float = 600.0
    silence: float | None = None


class RestartingClient:
    """A `Client` whose core is started again when its process dies or gives no sign of life.

    What was unfinished goes on in the new one, and whoever reads sees nothing but a pause: tokens depend on the tokens
    before them, the seed and the position, none of which died with the core. A request that was under way at two deaths
    ends with an error, since it may be the cause.

    `receive` does all the work, so that it is to be called again and again, by one thread at a time.

    Args:
      start: starts a core's process, without waiting for it.
      policy: see there.

    Attributes:
      ready, restarting, num_restarts: as of any `Client`.

    Raises what the first core fails with.
    """

    def __init__(self, start: Callable[[], Core], policy: RestartPolicy):
        self._start, self._policy = start, policy
        self._lock = threading.Lock()  # of all below but what only `receive` touches
        self._ledger = Ledger()
        self._utilities: dict[int, Utility] = {}  # not answered yet
        self._outbox: list[SequenceOutput] = []
        self._backlog: collections.deque[ToCore] | None = None  # what a new core is being told
        self._ended: JaxllmError | None = None
        self._wake = threading.Event()  # it has ended
        self.num_restarts = 0
        # Of `receive`
        self._restarts: collections.deque[float] = collections.deque()
        self._failed_starts = 0
        self._died_at = self._start_at = 0.0
        self._heard = time.monotonic()
        self._pinged: float | None = None
        self._next: Core | None = None  # that is being started
        self._core: Core | None = None  # that messages go to
        first = start()
        try:
            first.wait(None)
        except BaseException:
            first.close()
            raise
        self._core, self.ready = first, first.ready

    @property
    def restarting(self) -> bool:
        """The core has died, and another one is being started."""
        return self._core is None and self._ended is None

    @property
    def pid(self) -> int | None:
        """Of the core's process; None while there is none."""
        core = self._core
        return None if core is None else core.pid

    def send(self, message: ToCore) -> None:
        """Hands a message over, to a core that is still to come if need be. Raises EngineDeadError if none will."""
        with self._lock:
            if self._ended is not None:
                raise self._ended
            core, backlog = self._core, self._backlog
            there = core is not None or backlog is not None
            if isinstance(message, AddRequest):
                self._ledger.submit(message, sent=there)
            elif isinstance(message, Finish):
                self._outbox += self._ledger.finish(message.ids, message.reason, sent=there)
            else:
                self._utilities[message.call] = message
            if backlog is not None:
                backlog.append(message)
        if core is not None:
            # Outside the lock: a core that has stopped reading must not keep `receive` from finding that out.
            self._hand_over(core, message)

    def _hand_over(self, core: Core, message: ToCore) -> None:
        with contextlib.suppress(EngineDeadError):  # `receive` will notice; the next core gets what is noted here
            core.send(message)

    def receive(self, timeout: float) -> list[FromCore]:
        """As of any `Client`; may return nothing before the timeout. Raises EngineDeadError once no core will come."""
        with self._lock:
            outputs, self._outbox = self._outbox, []
            if self._ended is not None:
                raise self._ended
        if outputs:
            return [StepOutputs(outputs)]
        core = self._core
        if core is None:
            self._bring_back(timeout)
            return []
        try:
            messages = core.receive(timeout)
            if not messages:
                self._listen(core)
        except JaxllmError as error:
            self._lost(core, error)
            return []
        if messages:
            self._heard, self._pinged = time.monotonic(), None
        with self._lock:
            self._ledger.note(messages)
            return [message for message in messages if not self._is_pong(message)]

    def _is_pong(self, message: FromCore) -> bool:
        if not isinstance(message, UtilityResult):
            return False
        self._utilities.pop(message.call, None)
        return message.call == PING

    def _listen(self, core: Core) -> None:
        """Asks a silent core whether it lives. Raises EngineDeadError if it does not answer."""
        limit, now = self._policy.silence, time.monotonic()
        if limit is None:
            return
        if self._pinged is None:
            if now - self._heard > limit / 2:
                self._pinged = now
                # On a thread: a core that has stopped reading may leave no room for it.
                threading.Thread(target=self._hand_over, args=(core, Utility(PING, "ping")), daemon=True).start()
        elif now - self._pinged > limit / 2:
            silent = now - self._heard
            raise EngineDeadError(f"the engine process {core.pid} has given no sign of life for {silent:.0f} s")

    def _lost(self, core: Core, error: JaxllmError) -> None:
        """The core has died: what becomes of its requests. Raises the error if there will be no other."""
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._core, self._died_at = None, time.monotonic()
            self._outbox += self._ledger.core_died()
            unfinished = len(self._ledger)
        core.bury()
        self._count(error)
        logger.error("%s; starting another one, in which %d requests go on", error, unfinished)

    def _count(self, error: JaxllmError) -> None:
        """Counts a restart; raises EngineDeadError if there were too many."""
        now, policy = time.monotonic(), self._policy
        while self._restarts and self._restarts[0] < now - policy.window:
            self._restarts.popleft()
        if len(self._restarts) >= policy.most:
            often = f" after {policy.most} restarts in {policy.window:g} s (max_engine_restarts)" if policy.most else ""
            raise self._end(EngineDeadError(f"{error}{often}"))
        self._restarts.append(now)
        self.num_restarts += 1

    def _end(self, error: JaxllmError) -> JaxllmError:
        """Notes why there will be no core any more; the first reason stays."""
        with self._lock:
            self._ended = self._ended or error
            self._core = None
        self._wake.set()
        return self._ended

    def _bring_back(self, timeout: float) -> None:
        """A part of a restart, of up to `timeout` seconds."""
        pause = self._start_at - time.monotonic()
        if pause > 0:
            self._wake.wait(min(pause, timeout))
            return
        try:
            with self._lock:  # so that `close` sees either none or all of it
                if self._ended is not None:
                    raise self._ended
                core = self._next = self._next or self._start()
            if core.wait(timeout):
                self._replay(core)
        except JaxllmError as error:
            with self._lock:
                if self._ended is not None:
                    raise self._ended from None
                failed, self._next = self._next, None
            if failed is not None:
                failed.bury()
            self._start_at = time.monotonic() + min(LONGEST_PAUSE, 2.0**self._failed_starts)
            self._failed_starts += 1
            self._count(error)
            logger.error("the engine does not start again: %s", error)

    def _replay(self, core: Core) -> None:
        """Gives a new core all that is unfinished, and then what has been sent meanwhile, in this order."""
        with self._lock:
            backlog = self._backlog = collections.deque([*self._ledger.replays(), *self._utilities.values()])
        while True:
            with self._lock:
                if self._ended is not None:
                    raise self._ended
                if not backlog:
                    self._core, self._next, self._backlog = core, None, None
                    break
                message = backlog.popleft()
            self._hand_over(core, message)
        self._failed_starts = 0
        self._heard, self._pinged = time.monotonic(), None
        logger.warning("the engine is back after %.1f s, as process %d", self._heard - self._died_at, core.pid)

    def close(self) -> None:
        """Ends the core; `receive` then raises EngineDeadError. May be called from any thread."""
        with self._lock:
            self._ended = self._ended or EngineDeadError("the engine has been closed")
            cores = [core for core in (self._core, self._next) if core is not None]
        self._wake.set()
        for core in cores:
            core.close()
