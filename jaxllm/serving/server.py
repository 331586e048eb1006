"""Running the server: engine, socket, signals, draining."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from jaxllm.async_llm import AsyncLLM
from jaxllm.engine import heap
from jaxllm.errors import ConfigError
from jaxllm.serving import log
from jaxllm.serving.app import check, make_app, make_services
from jaxllm.serving.config import ServerConfig
from jaxllm.serving.services import Services

logger = logging.getLogger(__name__)
# libuv takes one connection a turn of the loop from a listening descriptor. In a turn that serves many streams
# more come, and they would wait ever longer: the socket listens under so many descriptors.
ACCEPTS = 64
MANY = 1 << 20  # concurrent requests in AsyncLLM: admission is the server's own


class Server(uvicorn.Server):
    """Uvicorn that drains: the first SIGTERM or SIGINT lets requests end, a second one does not.

    Attributes:
      failed: the engine has died.
    """

    def __init__(self, config: uvicorn.Config, services: Services):
        super().__init__(config)
        self._services, self._draining = services, False
        self._loop = asyncio.get_running_loop()
        self.failed = False
        self._tasks: set[asyncio.Task] = set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Lets nobody in any more, and ends once all have gone or the time is up."""
        self._draining = self._services.admission.draining = True
        self._tasks.add(asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        samples, seconds = self._services.admission.samples, self._services.config.drain_timeout
        log.event(logger, logging.INFO, "draining", samples=samples, at_most_seconds=seconds)
        try:
            await asyncio.wait_for(self._services.admission.drained(), seconds)
        except TimeoutError:
            log.event(logger, logging.WARNING, "time is up", samples=self._services.admission.samples)
        self.should_exit = True

    async def watch(self) -> None:
        """Ends the server once the engine has ended."""
        await self._services.heartbeat.died.wait()
        self.failed = self.should_exit = True


def bind(config: ServerConfig) -> socket.socket:
    """The listening socket to be. Raises ConfigError where the address is taken or none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        # With its protocol: asyncio sends small writes at once (TCP_NODELAY) only on sockets that tell it.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"host={config.host!r}, port={config.port}: {error.strerror or error}") from None
    return bound


async def serve(model: str, config: ServerConfig, options: dict[str, Any]) -> int:
    """Serves until a signal comes or the engine dies; the process's exit status. Raises any of jaxllm.errors."""
    check(config)
    with contextlib.closing(bind(config)) as bound:
        host, port = bound.getsockname()[:2]
        async with AsyncLLM(model, max_concurrent_requests=MANY, **options) as llm:
            services = make_services(llm, config)
            if llm.config.warm_up:
                logger.info("compiling all step sizes; --no-warm-up would begin at once and compile them on the way")
                await llm.warm_up()
            # What the start has left: walking it again and again would stop all streams and refusals.
            heap.freeze(heap.SERVERS_THRESHOLD)
            return await run(services, bound, f"http://{host}:{port}")


async def run(
    services: Services, bound: socket.socket, address: str, made: Callable[[Server], None] = lambda server: None
) -> int:
    """Serves on a bound socket; the exit status. `made` gets to know the server, to drain it without a signal."""
    settings = uvicorn.Config(
        make_app(services),
        log_config=None,
        access_log=False,
        lifespan="off",
        http="httptools",
        ws="none",
        server_header=False,
        proxy_headers=False,  # nothing asks for the client's address
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )
    server = Server(settings, services)
    made(server)
    beat = asyncio.ensure_future(services.heartbeat.run())
    watch = asyncio.ensure_future(server.watch())
    log.event(logger, logging.INFO, "serving", model=services.names[0], address=address, keys=services.keys.needed)
    try:
        await server.serve(sockets=[bound, *(bound.dup() for _ in range(ACCEPTS - 1))])
    finally:
        beat.cancel()
        watch.cancel()
        await asyncio.gather(beat, watch, return_exceptions=True)
        if services.tracing is not None:
            await asyncio.to_thread(services.tracing.close)
    return 1 if server.failed else 0
