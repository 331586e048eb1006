"""The loader: assembly, errors that name everything, memory, and dummy weights."""

import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError
from jaxllm.models import loader
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.registry import model_class
from jaxllm.models.sources import Parts
from tests.models.harness import GOLDENS, load_golden, run
from tests.models.memory import Memory

TINY = dict(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_bias=True,
)


def tiny(dtype=jnp.float32, **fields) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaForCausalLM.parse_config(TINY | fields), dtype=dtype)


@pytest.fixture
def tensors(rng) -> dict[str, np.ndarray]:
    """What a checkpoint of `tiny()` holds, written down by hand."""
    shapes = {"model.embed_tokens.weight": (32, 8), "model.norm.weight": (8,), "lm_head.weight": (32, 8)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.input_layernorm.weight": (8,), f"{layer}.post_attention_layernorm.weight": (8,)}
        shapes |= {
            f"{layer}.self_attn.{p}_proj.weight": (size, 8) for p, size in (("q", 8), ("k", 4), ("v", 4), ("o", 8))
        }
        shapes |= {f"{layer}.self_attn.{p}_proj.bias": (size,) for p, size in (("q", 8), ("k", 4), ("v", 4), ("o", 8))}
        shapes |= {f"{layer}.mlp.gate_proj.weight": (12, 8), f"{layer}.mlp.up_proj.weight": (12, 8)}
        shapes |= {f"{layer}.mlp.down_proj.weight": (8, 12)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_assembly(tensors):
    model = tiny()
    loader.load(model, Memory(tensors))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp

    def joined(prefix, names, kind):
        return np.concatenate([tensors[f"model.layers.1.{prefix}.{name}.{kind}"] for name in names])

    qkv = ("q_proj", "k_proj", "v_proj")
    np.testing.assert_array_equal(attention.qkv_proj.kernel[...], joined("self_attn", qkv, "weight").T)
    np.testing.assert_array_equal(attention.qkv_proj.bias[...], joined("self_attn", qkv, "bias"))
    gate_up = joined("mlp", ("gate_proj", "up_proj"), "weight").T
    np.testing.assert_array_equal(mlp.gate_up_proj.kernel[...], gate_up)
    np.testing.assert_array_equal(model.lm_head.kernel[...], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(model.model.embed_tokens.weight[...], tensors["model.embed_tokens.weight"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))


def test_dtypes(tensors):
    """Parameters become what they declare, or what is asked for."""
    for model, dtype in ((tiny(jnp.bfloat16), None), (tiny(), jnp.bfloat16)):
        loader.load(model, Memory(tensors), dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}
        expected = tensors["model.layers.0.mlp.down_proj.weight"].T.astype(jnp.bfloat16)
        np.testing.assert_array_equal(model.model.layers[0].mlp.down_proj.kernel[...], expected)


def test_transposed_by_the_device(tensors, monkeypatch):
    """Accelerators get projections as they are stored and transpose them; the result is the same, though the buffers
    that they copy from are used again."""
    plain, other = tiny(), tiny()
    loader.load(plain, Memory(tensors))
    put = jax.device_put
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_put", lambda value, where=None: put(np.array(value), where))
    axes = []
    loader.load(other, Memory(tensors), shardings=axes.append)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(plain), jax.tree.leaves(other))
    assert ("vocab", "embed") in axes and ("heads", "embed") in axes and ("embed", "heads") in axes and (None,) in axes


def test_all_problems_are_named(tensors):
    """Missing, extra and misshapen tensors, every one of them, before anything is read."""
    del tensors["model.layers.0.self_attn.q_proj.bias"], tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["visual.patch"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((12, 8), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((31, 8), np.float32)
    checkpoint = Memory(tensors)
    with pytest.raises(CheckpointError) as caught:
        loader.load(tiny(), checkpoint)
    assert str(caught.value) == (
        "memory: tensors do not fit the model; "
        "2 missing: model.layers.0.self_attn.q_proj.bias, model.norm.weight; "
        "2 extra: model.layers.2.mlp.up_proj.weight, visual.patch; "
        "2 misshapen: model.embed_tokens.weight has shape (31, 8), expected (32, 8), "
        "model.layers.1.mlp.down_proj.weight has shape (12, 8), expected (8, 12)"
    )
    assert checkpoint.read == []


def test_harmless_extras(tensors):
    """Derived buffers are passed over, and so is the output projection of a model that ties it to its embeddings."""
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    loader.load(tiny(), Memory(tensors))
    checkpoint = Memory(tensors)
    loader.load(tiny(tie_word_embeddings=True), checkpoint)
    assert "lm_head.weight" not in checkpoint.read
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight$"):
        loader.load(tiny(), Memory(tensors))


def test_read_errors_come_through(tensors):
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' is truncated"):
        loader.load(tiny(), Memory(tensors, broken=("model.layers.0.mlp.up_proj.weight",)))


def test_truncated_file(tmp_path):
    directory = shutil.copytree(GOLDENS / "llama", tmp_path / "llama")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        loader.load(tiny(), open_checkpoint(directory))


def test_memory():
    """On the CPU the buffers that are read into are the parameters: the host holds each once, and never more."""
    fields = dict(hidden_size=256, intermediate_size=512, vocab_size=2048, attention_bias=False)
    model = tiny(**fields)
    shapes = {}
    for path, parameter in loader.parameters_of(model):
        shapes |= dict(Parts(path, parameter).tensors())
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    tracemalloc.start()
    loader.load(model, Memory(zeros))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held >= total  # had they been copied, they would be gone
    assert peak <= total * 1.05 + 1e6


def test_progress(tensors):
    calls = []
    loader.load(tiny(), Memory(tensors), on_progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)
    with loader.progress_bar() as on_progress:
        loader.load(tiny(), Memory(tensors), on_progress=on_progress)


def flat(model: nnx.Module) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(p[...], np.float32) for path, p in loader.parameters_of(model)}


def test_dummy_weights():
    big = dict(hidden_size=64, intermediate_size=96, vocab_size=512)
    first, again, other, half = tiny(**big), tiny(**big), tiny(**big), tiny(jnp.bfloat16, **big)
    loader._dummy.cache_clear()
    for model, seed in ((first, 0), (again, 0), (other, 2**33 + 1), (half, 0)):
        loader.load_dummy(model, seed=seed)
    kernels = {p.shape for _, p in loader.parameters_of(first)}
    assert loader._dummy.cache_info().misses <= 2 * (len(kernels) + 1)  # a shape and dtype is compiled once
    a, b, c, d = map(flat, (first, again, other, half))
    values = []
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])
        np.testing.assert_allclose(d[name], value, rtol=2**-8)
        if "norm" in name:
            assert (value == 1).all()
            continue
        assert not np.array_equal(value, c[name])
        values.append(value.ravel()[:128])
        if value.size > 4000:
            assert abs(value.mean()) < 0.001 and abs(value.std() - 0.02) < 0.001
            assert abs(np.mean(np.abs(value) < 0.02) - 0.6827) < 0.02  # as a normal distribution has it
    correlation = np.corrcoef([v for v in values if len(v) == 128])
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.5
    assert jax.tree.leaves(half)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_dummy_weights_of_families(family):
    """A model of dummy weights runs; norms that are stored less one are zero."""
    config = open_checkpoint(GOLDENS / family).config
    cls = model_class(config)
    model = cls(cls.parse_config(config), dtype=jnp.float32)
    loader.load_dummy(model)
    norms = [value for name, value in flat(model).items() if "norm" in name]
    assert norms and all((value == (0 if family == "gemma3" else 1)).all() for value in norms)
    logits = run(model, np.arange(3, 23), [20], "reference", rung=20)
    assert np.isfinite(logits).all() and logits.std() > 0


def test_sharded_checkpoint():
    assert len(list((GOLDENS / "qwen3").glob("*.safetensors"))) == 2
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(load_golden("qwen3")))
