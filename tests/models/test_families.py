"""Every family's logits against those of transformers in float32 (`scripts/make_model_goldens.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.models.gemma2 import GemmaLayer
from jaxllm.models.gemma3 import Gemma3ForCausalLM
from jaxllm.models.loader import load_dummy
from tests.models.harness import GOLDENS, load_golden, run

FAMILIES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
TOLERANCE = 1e-4  # of logits up to 20


def golden(family: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    with np.load(GOLDENS / family / "golden.npz") as arrays:
        return arrays[f"tokens_{length}"], arrays[f"logits_{length}"]


def check(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= TOLERANCE


# Models hand attention their shapes, window, cap and scale, which both backends take alike (tests/pallas_kernels holds
# one against the other): the plain one and the one with all of these say so for all.
BOTH_BACKENDS = ("llama", "gemma2")


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        pytest.param(
            family,
            backend,
            marks=[pytest.mark.slow] * (backend == "reference" and family not in BOTH_BACKENDS),
        )
        for family in FAMILIES
        for backend in ("reference", "xla")
    ],
)
def test_one_prefill(family, backend):
    tokens, logits = golden(family, 56)
    check(run(load_golden(family), tokens, [56], backend, rung=64), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks(family):
    tokens, logits = golden(family, 56)
    check(run(load_golden(family), tokens, [7, 16, 1, 15, 2, 15], "xla", rung=16), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token(family):
    tokens, logits = golden(family, 56)
    check(run(load_golden(family), tokens, [1] * 56, "xla", rung=16), logits)  # the program of `test_chunks`


def test_longrope_short_side():
    """Where no sequence passes the original length, the short factors serve; elsewhere the long ones, for short
    sequences too."""
    tokens, logits = golden("phi3_longrope", 24)
    check(run(load_golden("phi3_longrope", max_length=32), tokens, [24], "xla", rung=32), logits)
    with pytest.raises(AssertionError):
        check(run(load_golden("phi3_longrope", max_length=33), tokens, [24], "xla", rung=32), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_keys_for_the_gpu_are_the_same(family):
    """There all heads are normalized and rotated at once."""
    model = load_golden(family)
    attention, rope = model.model.layers[0].self_attn, model.config.rope.tables(jnp.arange(5, 12))
    width = (attention.heads + 2 * attention.kv_heads) * attention.head_dim
    qkv = jnp.asarray(np.random.default_rng(0).standard_normal((7, width)), jnp.float32)
    both = jax.jit(lambda attention, *given: [attention._rotated(*given, backend) for backend in ("gpu", "xla")])
    for one, other in zip(*both(attention, qkv, rope), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_caches():
    """Layers of one window share a group, full attention first."""
    caches = load_golden("gemma3").layer_caches()
    assert [(cache.group, cache.window) for cache in caches] == [(1, 16), (1, 16), (0, None), (1, 16)]
    assert [(cache.num_kv_heads, cache.head_dim) for cache in caches] == [(2, 24)] * 4
    assert {(cache.group, cache.window) for cache in load_golden("mistral").layer_caches()} == {(0, 20)}


def test_layers_are_traced_once(monkeypatch):
    """Layers of one structure share a trace: tracing holds the interpreter's lock, and models have many layers."""
    traced = []
    for name in ("attend", "finish"):
        method = getattr(GemmaLayer, name)

        def counted(self, *args, name=name, call=method):
            traced.append(name)
            return call(self, *args)

        monkeypatch.setattr(GemmaLayer, name, counted)
    hf = dict(open_checkpoint(GOLDENS / "gemma3").config, num_hidden_layers=12, intermediate_size=44)
    model = Gemma3ForCausalLM(Gemma3ForCausalLM.parse_config(hf), dtype=jnp.float32)
    load_dummy(model)
    run(model, np.arange(8), [8], "reference", rung=8)
    assert sorted(traced) == ["attend", "attend", "finish", "finish"]  # sliding and full


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_output_rows(family):
    """The rows that are asked for, in their order and however often, are those of a step over all."""
    tokens, logits = golden(family, 56)
    kept = np.array([55, 3, 3])
    check(run(load_golden(family), tokens, [56], "xla", rung=64, output_rows=kept), logits[kept])
