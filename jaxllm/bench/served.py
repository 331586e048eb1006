"""What arrives online, sent to a server over HTTP: any that speaks OpenAI's completions with vLLM's fields."""

import contextlib
import json
from collections.abc import AsyncIterator, Sequence

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from jaxllm.bench.models import bench_model
from jaxllm.bench.serve import COUNTERS, RateResult, ServeWork, serve_rates
from jaxllm.bench.session import model_cost
from jaxllm.config import config_from
from jaxllm.errors import InvalidRequestError

TIMEOUT = httpx2.Timeout(600.0, connect=10.0)  # seconds
PREFIX = "jaxllm:"  # of the counters in /metrics


class Served:
    """A server as the target of `serve_rates`. Connections stay open from one request to the next."""

    def __init__(self, client: httpx2.AsyncClient, model: str, vocab_size: int):
        self._client, self._model, self.vocab_size = client, model, vocab_size

    async def outputs(self, prompt: Sequence[int], num_tokens: int, salt: str) -> AsyncIterator[int]:
        """Sends a request and yields how many tokens each event brings. Raises InvalidRequestError for another status
        than 200, and httpx2.HTTPError."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": salt,
        }
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise InvalidRequestError("url", str(self._client.base_url), f"answers {response.status_code}: {text}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        yield len(choice.get("token_ids") or ())

    async def stats(self) -> dict[str, float]:
        """The counters that results name, 0 where the server has none."""
        response = await self._client.get("/metrics")
        found = dict.fromkeys(COUNTERS, 0.0)
        if response.status_code != 200:
            return found
        names = {f"{PREFIX}{form}{counter}_total": counter for counter in COUNTERS for form in ("", "num_")}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name in names:
                    found[names[sample.name]] += sample.value
        return found


@contextlib.asynccontextmanager
async def open_served(url: str, vocab_size: int, api_key: str | None = None) -> AsyncIterator[Served]:
    """Connects to the server at `url` (without /v1), with a bearer token; prompts' tokens are below `vocab_size`.

    Raises InvalidRequestError where no server answers, or one that serves no model.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, limits=limits) as client:
        try:
            response = await client.get("/v1/models")
            response.raise_for_status()
            model = response.json()["data"][0]["id"]
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError) as error:
            raise InvalidRequestError("url", url, f"is no server of a model: {error}") from error
        yield Served(client, model, vocab_size)


async def run_served(url: str, model: str, work: ServeWork, api_key: str | None = None) -> list[RateResult]:
    """`serve_rates` on a server of `model`, whose config.json says how many tokens there are. Raises any of
    jaxllm.errors."""
    with bench_model(model, {}) as (path, _):
        _, hf = model_cost(config_from(path, {}))
    async with open_served(url, hf["vocab_size"], api_key) as target:
        return await serve_rates(target, work)
