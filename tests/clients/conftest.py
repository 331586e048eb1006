"""Servers in a process of jaxllm's environment; the tests run in that of the clients: see scripts/test_clients."""

import dataclasses
import json
import os
import socket
import subprocess
import threading
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = "sesame"

# Before the clients are imported: nothing is fetched, nothing is sent away.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_TELEMETRY"] = "False"
os.environ["LANGSMITH_TRACING"] = "false"
for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
    del os.environ[name]


@dataclasses.dataclass(frozen=True)
class Servers:
    """Addresses: see tests/clients/servers.py."""

    tiny: str
    parrot: str
    narrow: str


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Connections to anywhere else fail."""
    connect, elsewhere = socket.socket.connect, []

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(address)
            raise OSError(f"tests of clients connect to this machine only, not to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield
    assert not elsewhere


@pytest.fixture(scope="session")
def servers():
    python = os.environ.get("JAXLLM_TEST_PYTHON", str(ROOT / ".venv/bin/python"))
    with subprocess.Popen(
        [python, "-m", "tests.clients.servers"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Servers(**json.loads(process.stdout.readline()))
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture(scope="session")
def grammars(servers):
    """For tests of answers of a form that the request gives."""
    with urllib.request.urlopen(f"{servers.parrot}/openapi.json") as answer:
        schemas = json.load(answer)["components"]["schemas"]
    if "response_format" not in schemas["ChatRequest"]["properties"]:
        pytest.skip("the server takes no response_format")


@pytest.fixture
def busy(servers):
    """The narrow server's one place is taken for a second."""
    import openai

    client = openai.OpenAI(base_url=f"{servers.narrow}/v1", api_key="any", max_retries=0)
    said = [{"role": "user", "content": "x" * 100}]
    stream = client.chat.completions.create(model="parrot", messages=said, stream=True)
    next(stream)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    yield
    reader.join(30)
    assert not reader.is_alive()
