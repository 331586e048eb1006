"""/v1/embeddings and LLM.embed."""

import asyncio
import base64

import numpy as np
import pytest

from jaxllm import LLM, AsyncLLM, PoolingParams, SamplingParams
from jaxllm.errors import InvalidRequestError
from tests.engine import tiny

RAW = PoolingParams(normalize=False)


@pytest.fixture(scope="module")
def llm(model):
    with LLM(model, **tiny.OPTIONS) as found:
        yield found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_an_embedding_is_what_the_next_tokens_logits_are_made_of(llm):
    """Over one step and over several, and more prompts than are read at a time."""
    prompts = [[3 + (length + 7 * i) % 290 for i in range(length)] for length in (1, 2, 7, 130, 300)] + [
        [5, index] for index in range(70)
    ]
    head = tiny.tensors("llama")["lm_head.weight"]
    params = SamplingParams(max_tokens=1, logprobs=-1, temperature=0)
    expected = llm.generate(prompts[:8], params)
    llm.reset_prefix_cache()
    raw, unit = llm.embed(prompts, RAW), llm.embed(prompts)
    for prompt, one, other in zip(prompts, raw, unit, strict=True):
        vector = np.array(one.outputs.embedding, np.float32)
        assert vector.shape == (tiny.HIDDEN,) and one.prompt_token_ids == prompt
        np.testing.assert_allclose(other.outputs.embedding, vector / np.linalg.norm(vector), rtol=1e-4, atol=1e-5)
    for one, output in zip(raw, expected, strict=False):
        found = log_softmax(head @ np.array(one.outputs.embedding, np.float32))
        ((entries,),) = [output.outputs[0].logprobs]
        np.testing.assert_allclose([entries[token].logprob for token in range(tiny.VOCAB)], found, atol=2e-3)
    # The second time, the prefix cache had what it needed.
    assert unit[4].num_cached_tokens >= 288 and raw[4].num_cached_tokens == 0


def test_embeddings_beside_generation_change_nothing(model):
    async def main():
        async with AsyncLLM(model, engine_process=False, **tiny.OPTIONS) as llm:
            greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            prompts = tiny.prompts(6, seed=3)
            alone = [(await llm.complete(prompt, greedy)).outputs[0].token_ids for prompt in prompts]
            vectors = [(await llm.embed(prompt)).outputs.embedding for prompt in prompts]
            mixed = await asyncio.gather(*(llm.complete(p, greedy) for p in prompts), *(llm.embed(p) for p in prompts))
            assert [output.outputs[0].token_ids for output in mixed[:6]] == alone
            for output, vector in zip(mixed[6:], vectors, strict=True):
                np.testing.assert_allclose(output.outputs.embedding, vector, atol=1e-3)
            stats = await llm.stats()
            assert stats["running"] == stats["waiting"] == stats["cache_usage"] == 0

    asyncio.run(main())


def test_bad_prompts_and_params(llm):
    with pytest.raises(InvalidRequestError, match="token ids"):
        llm.embed([[1], [tiny.VOCAB]])
    with pytest.raises(InvalidRequestError, match="PoolingParams"):
        llm.embed([1], SamplingParams())


def test_the_endpoint(server):
    texts = ["the hand", "a ring in the sea"]
    answer = server.post("/v1/embeddings", input=texts, model="tiny")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["object"] == "list" and [row["index"] for row in body["data"]] == [0, 1]
    vectors = np.array([row["embedding"] for row in body["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    ids = server.services.llm.get_tokenizer().encode_batch(texts)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == sum(map(len, ids))
    coded = server.post("/v1/embeddings", input=ids, encoding_format="base64").json()["data"]
    decoded = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded]
    np.testing.assert_allclose(decoded, vectors, atol=1e-4)
    raw = server.post("/v1/embeddings", input=texts[0], normalize=False).json()["data"][0]["embedding"]
    np.testing.assert_allclose(raw / np.linalg.norm(raw), vectors[0], atol=1e-4)
    cut = server.post("/v1/embeddings", input=texts[1], truncate_prompt_tokens=2).json()
    assert cut["usage"]["prompt_tokens"] == 2
    assert server.call(lambda: server.services.admission.samples) == 0


def test_the_official_client(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    (row,) = client.embeddings.create(model="tiny", input="the hand").data  # asks for base64 by itself
    assert len(row.embedding) == tiny.HIDDEN and isinstance(row.embedding[0], float)


@pytest.mark.parametrize(
    "body,param,code",
    [
        ({"input": "a", "dimensions": 8}, "dimensions", "unsupported"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": [tiny.VOCAB]}, "input", "invalid_value"),
        ({"input": [1] * 600}, "input", "context_length_exceeded"),
        ({"messages": []}, "messages", "unsupported"),
        ({"input": "a", "temperature": 1}, "temperature", "unknown_field"),
    ],
)
def test_what_is_refused(server, body, param, code):
    answer = server.http.post("/v1/embeddings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
