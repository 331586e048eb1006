"""Whether the engine lives: asked every second, with its figures as the answer."""

import asyncio
import logging
import time
from typing import Any

from jaxllm.async_llm import AsyncLLM
from jaxllm.errors import EngineDeadError
from jaxllm.serving.errors import ApiError

logger = logging.getLogger(__name__)
RESTART_RETRY = 5  # seconds after which to ask again about an engine that hangs or is being restarted


class Heartbeat:
    """One engine's.

    Attributes:
      stats: the engine's last figures, see `AsyncLLM.stats`.
      died: set once the engine has ended.
    """

    def __init__(self, llm: AsyncLLM, timeout: float, interval: float = 1.0):
        self._llm, self._timeout, self._interval = llm, timeout, interval
        self._last = time.monotonic()
        self._error: BaseException | None = None
        self.stats: dict[str, Any] = {}
        self.died = asyncio.Event()

    @property
    def age(self) -> float:
        """Seconds since the engine's last answer."""
        return time.monotonic() - self._last

    async def run(self) -> None:
        """Asks again and again, until the engine has ended."""
        while True:
            try:
                await self.beat()
            except EngineDeadError as error:
                self._error = error
                logger.critical("%s", error)
                self.died.set()
                return
            except RuntimeError:
                logger.exception("the engine gives no figures")
            await asyncio.sleep(self._interval)

    async def beat(self) -> None:
        """Asks once. Raises EngineDeadError; does not return while the engine does not answer."""
        self.stats = await self._llm.stats()
        self._last = time.monotonic()

    def check(self) -> None:
        """Raises ApiError (503) unless the engine is there and has answered within the timeout."""
        if self._error is not None:
            raise ApiError(503, str(self._error), None, "engine_dead")
        if self._llm.restarting:
            message = "the engine has died and is being started again; its requests will go on"
            raise ApiError(503, message, None, "engine_restarting", retry_after=RESTART_RETRY)
        if self.age > self._timeout:
            message = f"the engine has not answered for {self.age:.0f} s (limit: {self._timeout:g} s)"
            raise ApiError(503, message, None, "engine_stuck", retry_after=RESTART_RETRY)
