"""Engines that the tests of a worker share: one a model and a set of sizes."""

from collections.abc import Callable

import pytest

from jaxllm import LLM, RequestOutput, SamplingParams
from tests.engine import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], str]:
    """The directory of a tiny model, by kind."""
    made: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tiny.write_checkpoint(kind, tmp_path_factory.mktemp(kind)))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def engine(checkpoint):
    """A shared engine of that kind and those options. Tests leave nothing running in it."""
    made: dict[tuple, LLM] = {}

    def get(kind: str = "llama", **options) -> LLM:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = tiny.llm(checkpoint(kind), **options)
        return made[key]

    yield get
    for llm in made.values():
        llm.close()


Work = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="session")
def truth(engine):
    """32 requests of mixed parameters, and what each of them gives alone in an engine with an empty cache."""
    made: dict[str, tuple[Work, list[RequestOutput]]] = {}

    def get(kind: str) -> tuple[Work, list[RequestOutput]]:
        if kind not in made:
            work = [(prompt, tiny.mixed_params(i)) for i, prompt in enumerate(tiny.prompts(32))]
            outputs = []
            for prompt, params in work:
                engine(kind).reset_prefix_cache()
                outputs += engine(kind).generate(prompt, params)
            engine(kind).reset_prefix_cache()
            made[kind] = work, outputs
        return made[kind]

    return get
