"""The attention of a model on GPUs that are not there."""

import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import resolve
from jaxllm.errors import ConfigError
from jaxllm.models.llama import LlamaForCausalLM

FIELDS = dict(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)


@pytest.fixture
def plan(monkeypatch):
    """Plans an engine for a model of these fields as on a Hopper GPU."""

    def make(dtype: str = "bfloat16", attention_backend=None, page_size: int = 64, **fields):
        monkeypatch.setattr(resolve, "resolve_backend", lambda config: config.attention_backend or "gpu")
        model = LlamaForCausalLM(LlamaForCausalLM.parse_config(FIELDS | fields), dtype=jnp.dtype(dtype))
        options = dict(attention_backend=attention_backend, page_size=page_size, kv_cache_memory_bytes=10_000_000)
        return resolve.plan_engine(EngineConfig(dtype=dtype, **options), model)

    return make


def test_the_kernels_take_what_they_can(plan, caplog):
    with caplog.at_level(logging.WARNING):
        assert plan().backend == "gpu"
        assert plan(num_attention_heads=14).backend == "gpu"  # a group of seven
        assert plan(num_attention_heads=34).backend == "gpu"  # of seventeen
        assert plan(num_attention_heads=71, num_key_value_heads=1).backend == "gpu"
        assert plan(head_dim=96).backend == "gpu"
    assert "plain XLA" not in caplog.text


@pytest.mark.parametrize(
    ("lacking", "fields"),
    [
        ("head_dim 512, above 256", dict(head_dim=512)),
        ("a cache of float32, not bfloat16", dict(dtype="float32")),
    ],
)
def test_what_they_lack_runs_through_xla_and_the_log_says_so(plan, caplog, lacking, fields):
    with caplog.at_level(logging.WARNING):
        assert plan(**fields).backend == "xla"
    assert f"{lacking}: attention runs through plain XLA" in caplog.text
    with pytest.raises(ConfigError, match=f"attention_backend='gpu': {lacking}"):
        plan(**fields, attention_backend="gpu")


def test_a_page_size_that_they_lack_is_refused(plan):
    with pytest.raises(
        ConfigError, match=r"page_size=8, attention_backend='gpu': .* choose one of \(16, 32, 64, 128\)"
    ):
        plan(page_size=8)


@pytest.mark.parametrize(
    ("kind", "capability", "backend"),
    [
        ("NVIDIA A100-SXM4-40GB", "8.0", "xla"),
        ("NVIDIA L4", "8.9", "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", "gpu"),
        ("NVIDIA B200", "10.0", "xla"),
    ],
)
def test_gpus_other_than_hopper_run_plain_xla_and_the_log_says_so(monkeypatch, caplog, kind, capability, backend):
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = LlamaForCausalLM(LlamaForCausalLM.parse_config(FIELDS), dtype=jnp.bfloat16)
    with caplog.at_level(logging.WARNING):
        plan = resolve.plan_engine(EngineConfig(kv_cache_memory_bytes=10_000_000), model)
    assert plan.backend == backend and plan.dtype == jnp.bfloat16
    said = f"{kind} (compute capability {capability}): attention runs through plain XLA, the kernel needs Hopper (9.0)"
    assert caplog.messages == ([said] if backend == "xla" else [])
    asked = EngineConfig(kv_cache_memory_bytes=10_000_000, attention_backend="gpu")
    if backend == "gpu":
        assert resolve.plan_engine(asked, model).backend == "gpu"
    else:
        with pytest.raises(ConfigError, match=re.escape(f"this is {kind} ({capability}), where 'xla' runs")):
            resolve.plan_engine(asked, model)


def test_kernels_for_tpus_that_they_have_no_sizes_for_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu", device_kind="TPU v3")])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="attention_backend='tpu': the kernels have no sizes for TPU v3"):
        resolve.resolve_backend(EngineConfig(attention_backend="tpu"))
