"""What families read from config.json, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import UnsupportedModelError
from jaxllm.models.registry import ARCHITECTURES, model_class
from jaxllm.models.rope import Rope
from tests.models.harness import GOLDENS


def parse(hf: dict):
    return model_class(hf).parse_config(hf)


def config_of(family: str) -> dict:
    return dict(open_checkpoint(GOLDENS / family).config)


def published(architecture: str, vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv: int, **rest):
    return dict(
        architectures=[architecture],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **rest,
    )


# The published models' numbers of parameters, from their published configs.
PUBLISHED = {
    "Llama-3.1-8B": (published("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8), 8_030_261_248),
    "SmolLM2-135M": (
        published("LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
        134_515_008,
    ),
    "Mistral-7B-v0.1": (published("MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "Qwen2.5-7B": (published("Qwen2ForCausalLM", 152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "Qwen3-0.6B": (
        published("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
        596_049_920,
    ),
    "gemma-2-2b": (published("Gemma2ForCausalLM", 256000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-3-1b": (published("Gemma3ForCausalLM", 262144, 1152, 6912, 26, 4, 1), 999_885_952),
    "Phi-3-mini-4k": (published("Phi3ForCausalLM", 32064, 3072, 8192, 32, 32, 32), 3_821_079_552),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name):
    hf, parameters = PUBLISHED[name]
    model = model_class(hf)(parse(hf), dtype=jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters


def test_defaults_are_those_of_transformers():
    """What a config.json leaves out."""
    mistral = PUBLISHED["Mistral-7B-v0.1"][0]
    assert set(parse(mistral).windows) == {4096}
    assert set(parse(mistral | {"sliding_window": None}).windows) == {None}
    gemma2, gemma3 = (parse(PUBLISHED[name][0]) for name in ("gemma-2-2b", "gemma-3-1b"))
    assert gemma2.windows == (4096, None) * 13 and (gemma2.attention_cap, gemma2.final_cap) == (50.0, 30.0)
    assert [window is None for window in gemma3.windows[:12]] == [False] * 5 + [True] + [False] * 5 + [True]
    assert gemma3.rope.inverse_frequencies[1] == pytest.approx(1e6 ** (-2 / 256), rel=1e-6)
    assert gemma3.local_rope.inverse_frequencies[1] == pytest.approx(1e4 ** (-2 / 256), rel=1e-6)
    assert (gemma3.attention_cap, gemma3.final_cap, gemma3.head_dim) == (None, None, 256)
    assert parse(PUBLISHED["Phi-3-mini-4k"][0]).rms_norm_eps == 1e-5


def test_qwen_windows():
    """Windows count only with use_sliding_window; then the layers from max_window_layers on slide."""
    hf = PUBLISHED["Qwen2.5-7B"][0] | {"sliding_window": 512, "max_window_layers": 20}
    assert set(parse(hf).windows) == {None}
    assert parse(hf | {"use_sliding_window": True}).windows == (None,) * 20 + (512,) * 8
    types = ["sliding_attention", "full_attention"] * 14
    assert parse(hf | {"use_sliding_window": True, "layer_types": types}).windows == (512, None) * 14


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2_yarn", "gemma3", "phi3_longrope"])
def test_rope_in_both_styles(family):
    """rope_scaling and its neighbours (transformers 4) mean what rope_parameters (5) does."""
    old = config_of(family)
    new = dict(old)
    rope = {"rope_type": "default"} | (new.pop("rope_scaling") or {})
    rope |= {name: new.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in new}
    if family == "gemma3":
        local = {"rope_type": "default", "rope_theta": new.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
    new["rope_parameters"] = rope
    assert parse(new) == parse(old)


REFUSALS = [
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor=None"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor=nan"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ("llama", {"hidden_size": "64"}, "hidden_size='64'"),
    ("llama", {"vocab_size": None}, "vocab_size"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    ("llama", {"rope_parameters": None, "rope_theta": -1.0}, "rope_theta=-1.0"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("qwen2", {"use_sliding_window": False}, "sliding_window"),  # its layer_types name sliding layers
    ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
    ("phi3_longrope", {"partial_rotary_factor": 0.7}, "partial_rotary_factor=0.7"),
    ("phi3_longrope", {"partial_rotary_factor": 0.5}, "short_factor"),
]


@pytest.mark.parametrize("family,change,named", REFUSALS, ids=[f"{f}-{n}" for f, _, n in REFUSALS])
def test_refusals(family, change, named):
    with pytest.raises(UnsupportedModelError) as caught:
        parse(config_of(family) | change)
    assert named in str(caught.value)


def test_unknown_architectures():
    with pytest.raises(UnsupportedModelError) as caught:
        model_class({"architectures": ["BertModel"]})
    assert "BertModel" in str(caught.value) and all(name in str(caught.value) for name in ARCHITECTURES)
    with pytest.raises(UnsupportedModelError, match="supported are"):
        model_class({})
    with pytest.raises(UnsupportedModelError, match=r"Gemma3ForConditionalGeneration.*images.*Gemma3ForCausalLM"):
        model_class({"architectures": ["Gemma3ForConditionalGeneration"]})


def test_rope_far_out():
    """Angles of far positions: float32 products as transformers has them, cosines good to the last bits."""
    rope = Rope.from_hf({"rope_theta": 500000.0}, 128, 131072)
    positions = np.array([0, 1, 8191, 65537, 131071])
    cos, sin = jax.jit(rope.tables)(jnp.asarray(positions))
    angles = positions.astype(np.float32)[:, None] * np.asarray(rope.inverse_frequencies, np.float32)
    np.testing.assert_allclose(cos, np.cos(angles.astype(np.float64)), atol=3e-7)
    np.testing.assert_allclose(sin, np.sin(angles.astype(np.float64)), atol=3e-7)


@pytest.mark.parametrize(
    "family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3_longrope"]
)
def test_nonsense_is_refused_by_name(family):
    """Whatever stands in a field that is read, parsing ends in a config or in an error that names the field."""
    config = config_of(family)
    nested = {f"rope_scaling.{name}" for name in config.get("rope_scaling") or {}}
    for field in sorted((config.keys() | nested) - {"architectures"}):
        for nonsense in (None, -1, 0, 1.5, 1e400, float("nan"), True, "x", [], ["x"], {}, {"x": 1}):
            outer, _, inner = field.partition(".")
            changed = config | {outer: config[outer] | {inner: nonsense} if inner else nonsense}
            try:
                parse(changed)
            except UnsupportedModelError as error:
                named = (inner or outer).split("_")[0]
                assert named in str(error), (field, nonsense, str(error))
