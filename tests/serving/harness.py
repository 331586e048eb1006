"""A server on a thread of its own, over a real socket, with a tiny engine."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from jaxllm import AsyncLLM
from jaxllm.bench.stub_engine import stub_engine
from jaxllm.checkpoint import open_checkpoint
from jaxllm.engine.messages import AddRequest
from jaxllm.frontend.engine import FrontEngine
from jaxllm.serving.app import make_services
from jaxllm.serving.config import ServerConfig
from jaxllm.serving.server import MANY, bind, run
from tests.engine import tiny

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}{{ lead or '' }}"
)


def write_chat_model(directory: Path, **config: Any) -> str:
    """A tiny Llama with a chat template and room for 512 tokens."""
    tiny.write_checkpoint("llama", directory, max_position_embeddings=512, **config)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return str(directory)


def scripted(model: str, texts: list[str], **options: Any) -> FrontEngine:
    """An engine that answers with these texts, one request after the other."""
    tokenizer = open_checkpoint(model, None).tokenizer()

    def reply(_: AddRequest) -> list[int]:
        return [*tokenizer.encode(texts.pop(0), add_special_tokens=False), tiny.EOS]

    engine = stub_engine(tokenizer, reply, **options)
    engine.builder.eos_token_ids = frozenset({tiny.EOS})
    return engine


class Running:
    """A server under test.

    Attributes:
      url: its address.
      services: its parts; touch them on its loop only.
      http: a client of it.
    """

    def __init__(self, found: dict[str, Any]):
        self.url, self.services, self._loop = found["url"], found["services"], found["loop"]
        self._found, url = found, found["url"]
        self.http = httpx2.Client(base_url=url, timeout=60)

    def call(self, function, *arguments) -> Any:
        """Runs a function or coroutine function on the server's loop."""

        async def work():
            result = function(*arguments)
            return await result if asyncio.iscoroutine(result) else result

        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(timeout=60)

    def drain(self) -> None:
        """What a SIGTERM does."""
        self.call(self._found["server"].drain)

    @property
    def ended(self) -> bool:
        """Whether the server has ended by itself."""
        return "status" in self._found

    @property
    def status(self) -> int:
        """The exit status it ended with."""
        return self._found["status"]

    def stats(self) -> dict[str, Any]:
        """The engine's figures."""
        return self.call(self.services.llm.stats)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """A JSON request."""
        return self.http.post(path, json=body)

    def events(self, path: str, **body: Any) -> list[Any]:
        """A stream's events, [DONE] checked and left out."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]


@contextlib.contextmanager
def running(model: str | FrontEngine, engine: dict[str, Any] | None = None, **config: Any) -> Iterator[Running]:
    """Starts a server of a model, or of an engine that is there; ends it when the block ends."""
    settings = ServerConfig(**{"port": 0, "log_level": "warning", **config})
    ready: Any = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        options: dict[str, Any] = {**tiny.OPTIONS, "engine_process": False, **(engine or {})}
        opened = {"model": model, **options} if isinstance(model, str) else {"engine": model}
        async with AsyncLLM(max_concurrent_requests=MANY, **opened) as llm:
            services = make_services(llm, settings)
            with contextlib.closing(bind(settings)) as bound:
                url = f"http://127.0.0.1:{bound.getsockname()[1]}"
                found.update(url=url, services=services, loop=asyncio.get_running_loop())
                work = asyncio.ensure_future(run(services, bound, url, lambda made: found.update(server=made)))
                found["stop"] = work.cancel
                ready.set()
                with contextlib.suppress(asyncio.CancelledError):
                    found["status"] = await work

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    ready.wait(60)
    assert "error" not in found and "url" in found, found
    server = Running(found)
    for _ in range(200):
        with contextlib.suppress(httpx2.TransportError):
            if server.http.get("/health").status_code == 200:
                break
        threading.Event().wait(0.02)
    try:
        yield server
    finally:
        server.http.close()
        if thread.is_alive():
            found["loop"].call_soon_threadsafe(found["stop"])
        thread.join(30)
        assert not thread.is_alive()
