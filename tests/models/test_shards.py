"""What each tensor-parallel shard reads of a checkpoint, and which shapes can be cut."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError
from jaxllm.models import loader
from jaxllm.models.config import DecoderConfig
from jaxllm.models.llama import LlamaForCausalLM
from jaxllm.models.phi3 import Phi3ForCausalLM
from jaxllm.models.sources import Parts, origins
from tests.models.memory import Memory

FIELDS = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=4,
    attention_bias=True,
    pad_token_id=0,
)


def abstract(family, shards: int, **fields):
    config = family.parse_config(FIELDS | fields)
    return family(config.for_shards(shards), dtype=jnp.float32)


def checkpoint_of(model, rng) -> Memory:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, parameter in loader.parameters_of(model):
        shapes |= dict(Parts(path, parameter).tensors())
    return Memory({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


@pytest.mark.parametrize("family", [LlamaForCausalLM, Phi3ForCausalLM], ids=["apart", "fused"])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_each_shard_reads_its_own_heads_and_halves(family, shards, rng):
    whole = abstract(family, 1)
    checkpoint = checkpoint_of(whole, rng)
    tensors = checkpoint.tensors
    layer = "model.layers.0."
    if family is Phi3ForCausalLM:
        q, k, v = np.split(tensors[layer + "self_attn.qkv_proj.weight"], [32, 40])
        gate, up = np.split(tensors[layer + "mlp.gate_up_proj.weight"], 2)
    else:
        q, k, v = (tensors[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
        gate, up = (tensors[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    model = abstract(family, shards)
    parameters = {".".join(map(str, path)): (path, parameter) for path, parameter in loader.parameters_of(model)}

    def part(name: str, shard: int, shape: tuple[int, ...]) -> np.ndarray:
        out = np.full(shape, np.nan, np.float32)
        before = checkpoint.num_read
        Parts(*parameters[name]).fill(out, shard, checkpoint)
        assert checkpoint.num_read - before <= out.size, "it read what it does not own"
        return out

    heads, width = 8 // shards, 24 // shards
    for shard in range(shards):
        # a query head's keys and values are those of its group
        kv_heads = sorted({head // 4 for head in range(shard * heads, (shard + 1) * heads)})
        expected = [q.reshape(8, 4, 16)[shard * heads : (shard + 1) * heads]]
        expected += [x.reshape(2, 4, 16)[kv_heads] for x in (k, v)]
        joined = np.concatenate(expected).reshape(-1, 16)
        np.testing.assert_array_equal(part("model.layers.0.self_attn.qkv_proj.kernel", shard, joined.shape), joined)
        own = slice(shard * width, (shard + 1) * width)
        joined = np.concatenate([gate[own], up[own]])
        np.testing.assert_array_equal(part("model.layers.0.mlp.gate_up_proj.kernel", shard, joined.shape), joined)
        down = tensors[layer + "mlp.down_proj.weight"][:, own]
        np.testing.assert_array_equal(part("model.layers.0.mlp.down_proj.kernel", shard, down.shape), down)
        o = tensors[layer + "self_attn.o_proj.weight"][:, shard * heads * 4 : (shard + 1) * heads * 4]
        np.testing.assert_array_equal(part("model.layers.0.self_attn.o_proj.kernel", shard, o.shape), o)
        rows = -(-37 // shards)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            padded = np.pad(tensors[name], ((0, shards * rows - 37), (0, 0)))[shard * rows : (shard + 1) * rows]
            ours = name.replace("lm_head.weight", "lm_head.kernel")
            np.testing.assert_array_equal(part(ours, shard, padded.shape), padded)
        norm = tensors["model.norm.weight"]
        np.testing.assert_array_equal(part("model.norm.weight", shard, norm.shape), norm)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_dummy_weights_of_shards_are_those_of_the_whole(shards):
    whole, cut = abstract(LlamaForCausalLM, 1), abstract(LlamaForCausalLM, shards)
    for model in (whole, cut):
        loader.load_dummy(model, seed=3)
    for (path, one), (_, other) in zip(loader.parameters_of(whole), loader.parameters_of(cut), strict=True):
        parts = Parts(path, other)
        places = origins(parts.sources, parts.rows)
        expected = np.take(np.asarray(one[...]), places, axis=parts.joined_axis)
        np.testing.assert_array_equal(other[...], expected)
    qkv = whole.model.layers[0].self_attn.qkv_proj.kernel[...], cut.model.layers[0].self_attn.qkv_proj.kernel[...]
    assert qkv[0].shape == (16, 48) and qkv[1].shape == (16, 32 + 2 * 4 * max(2, shards))


def config(**fields) -> DecoderConfig:
    return LlamaForCausalLM.parse_config(FIELDS | fields)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({}, [1, 2, 4, 8]),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}, [1, 3]),  # SmolLM2
        ({"num_attention_heads": 6, "num_key_value_heads": 1}, [1, 2, 3, 6]),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, [1, 2, 4, 12]),  # not 6: 4 heads over 6 shards
        ({"intermediate_size": 22}, [1, 2]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(fields, allowed):
    for count in range(1, 17):
        if count in allowed:
            assert config(**fields).for_shards(count).tensor_shards == count
        else:
            listed = ", ".join(map(str, allowed))
            with pytest.raises(ConfigError, match=rf"tensor_parallel_size={count}: .*allows {listed}$"):
                config(**fields).for_shards(count)


def test_a_shards_share_of_the_caches():
    caches = [abstract(LlamaForCausalLM, shards).layer_caches()[0].num_kv_heads for shards in (1, 2, 4, 8)]
    assert caches == [2, 1, 1, 1]
