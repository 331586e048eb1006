"""One server for the tests of a worker; tests leave nothing running in it."""

import openai
import pytest

from tests.serving.harness import running, scripted, write_chat_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def server(model):
    with running(
        model, served_model_name=["tiny", "alias"], tool_call_parser="hermes", reasoning_parser="qwen3"
    ) as found:
        yield found


@pytest.fixture(scope="session")
def script() -> list[str]:
    """What the engine of `stub` is to say, answer by answer."""
    return []


@pytest.fixture(scope="session")
def stub(model, script):
    """A server whose engine follows the script."""
    engine = scripted(model, script)
    with running(engine, served_model_name=["s"], tool_call_parser="hermes", reasoning_parser="qwen3") as found:
        yield found


@pytest.fixture(scope="session")
def client(stub) -> openai.OpenAI:
    """The official client of it."""
    return openai.OpenAI(base_url=f"{stub.url}/v1", api_key="any", max_retries=0)
