"""Admin routes: keys of their own, and what they do."""

import pytest

from jaxllm.errors import ConfigError
from jaxllm.serving.auth import load_admin_keys
from jaxllm.serving.config import ServerConfig
from tests.serving.harness import running

KEY, ADMIN = "sk-client", "sk-operator"


@pytest.fixture(scope="module")
def guarded(model):
    with running(model, api_key=[KEY], admin_api_key=[ADMIN]) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_resetting_the_prefix_cache(guarded):
    body = {"prompt": list(range(40, 90)), "max_tokens": 1}

    def cached() -> int:
        usage = guarded.http.post("/v1/completions", json=body, headers=bearer(KEY)).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(), cached()] == [0, 48]
    for headers in ({}, bearer(KEY), bearer("x")):
        assert guarded.http.post("/reset_prefix_cache", headers=headers).status_code == 401
    assert cached() == 48
    assert guarded.http.post("/reset_prefix_cache", headers=bearer(ADMIN)).status_code == 200
    assert [cached(), cached()] == [0, 48]
    # An operator's key is no client's.
    assert guarded.http.post("/v1/completions", json=body, headers=bearer(ADMIN)).status_code == 401


def test_adapters_are_refused_by_name(guarded):
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert guarded.http.post(path, headers=bearer(KEY)).status_code == 401
        refused = guarded.http.post(path, json={"lora_name": "a"}, headers=bearer(ADMIN))
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["code"] == "unsupported" and "no LoRA adapters" in error["message"]


def test_without_a_key_they_are_closed(server):
    for path in ("/reset_prefix_cache", "/v1/load_lora_adapter"):
        refused = server.http.post(path, headers=bearer("any"))
        assert refused.status_code == 403 and "--admin-api-key" in refused.json()["error"]["message"]


def test_a_client_and_an_operator_never_share_a_key(monkeypatch):
    with pytest.raises(ConfigError, match="must differ") as caught:
        load_admin_keys(ServerConfig(api_key=[KEY], admin_api_key=[KEY]))
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="admin_api_key=…"):
        ServerConfig(admin_api_key=["a b\n"])
    monkeypatch.setenv("JAXLLM_ADMIN_API_KEY", ADMIN)
    assert load_admin_keys(ServerConfig()).find({b"authorization": f"Bearer {ADMIN}".encode()})
