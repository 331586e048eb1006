"""instructor over the server."""

import asyncio
import json
from collections.abc import Iterable

import pytest

instructor = pytest.importorskip("instructor", reason="scripts/test_clients runs these")
import openai  # noqa: E402
from instructor.core.exceptions import InstructorRetryException  # noqa: E402
from pydantic import BaseModel, field_validator  # noqa: E402

from tests.clients.conftest import KEY  # noqa: E402
from tests.clients.test_openai import ARGUMENTS, LOOSE, PLAIN, Weather, say  # noqa: E402

Mode = instructor.Mode
SAID = json.dumps(ARGUMENTS)


def call(name: str, arguments: dict = ARGUMENTS) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def parrot(servers):
    def make(mode, asynchronous=False, slow=False):
        kind = openai.AsyncOpenAI if asynchronous else openai.OpenAI
        client = kind(base_url=f"{servers.narrow if slow else servers.parrot}/v1", api_key="any", max_retries=0)
        return instructor.from_openai(client, mode=mode, model="parrot")

    return make


@pytest.fixture(scope="module")
def tiny(servers):
    def make(mode):
        client = openai.OpenAI(base_url=f"{servers.tiny}/v1", api_key=KEY, max_retries=0)
        options = LOOSE if mode is Mode.TOOLS else dict(temperature=0, max_tokens=250, extra_body=PLAIN)
        return instructor.from_openai(client, mode=mode, model="tiny", **options)

    return make


@pytest.mark.usefixtures("grammars")
@pytest.mark.parametrize("mode", [Mode.JSON_SCHEMA, Mode.TOOLS])
def test_a_model_made_to_answer(tiny, mode):
    assert isinstance(tiny(mode).create(response_model=Weather, messages=say("The weather?")), Weather)


@pytest.mark.usefixtures("grammars")
@pytest.mark.parametrize("mode", [Mode.JSON, Mode.JSON_SCHEMA])
def test_json(parrot, mode):
    found, answer = parrot(mode).create_with_completion(response_model=Weather, messages=say(SAID))
    assert found.model_dump() == ARGUMENTS and answer.usage.completion_tokens > 0


def test_json_in_markdown(parrot):
    client = parrot(Mode.MD_JSON)
    said = say(f"```json\n{SAID}\n```")
    assert client.create(response_model=Weather, messages=said).model_dump() == ARGUMENTS
    *_, last = client.create_partial(response_model=Weather, messages=said)
    assert last.model_dump() == ARGUMENTS


@pytest.mark.usefixtures("grammars")
def test_partial_answers_grow(parrot):
    found = list(parrot(Mode.JSON, slow=True).create_partial(response_model=Weather, messages=say(SAID)))
    assert found[-1].model_dump() == ARGUMENTS and found[0].degrees is None


@pytest.mark.usefixtures("grammars")
def test_several_objects(parrot):
    said = json.dumps({"tasks": [ARGUMENTS, ARGUMENTS | {"city": "Graz"}]})
    found = list(parrot(Mode.JSON).create_iterable(response_model=Weather, messages=say(said)))
    assert [one.city for one in found] == ["Wien", "Graz"]


@pytest.mark.usefixtures("grammars")
def test_async(parrot):
    async def work():
        client = parrot(Mode.JSON, asynchronous=True)
        return await asyncio.gather(*(client.create(response_model=Weather, messages=say(SAID)) for _ in range(8)))

    assert [found.model_dump() for found in asyncio.run(work())] == [ARGUMENTS] * 8


def test_parallel_tools(parrot):
    client = parrot(Mode.PARALLEL_TOOLS)
    said = call("Weather") + call("Weather", ARGUMENTS | {"city": "Graz"})
    found = list(client.create(response_model=Iterable[Weather], messages=say(said)))
    assert [one.city for one in found] == ["Wien", "Graz"]


@pytest.mark.usefixtures("grammars")
def test_wrong_answers_are_asked_for_again(parrot):
    tries = []

    class Picky(BaseModel):
        city: str

        @field_validator("city")
        @classmethod
        def check(cls, value):
            tries.append(value)
            raise ValueError("never right")

    with pytest.raises(InstructorRetryException):
        parrot(Mode.JSON).create(response_model=Picky, messages=say('{"city": "Linz"}'), max_retries=2)
    assert tries[0] == "Linz"
