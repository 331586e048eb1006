"""One server for the tests of a worker; tests leave nothing running in it."""

import pytest

from tests.serving.harness import running, write_chat_model


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return write_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def server(model):
    with running(
        model, served_model_name=["tiny", "alias"], tool_call_parser="hermes", reasoning_parser="qwen3"
    ) as found:
        yield found
