import numpy as np
import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint import gguf_files


def config_of(tmp_path, arch, extra=None, tensors=None):
    gguf_files.write_model(tmp_path / "model.gguf", arch, extra=extra, extra_tensors=tensors)
    return open_checkpoint(tmp_path / "model.gguf").config


def test_llama(tmp_path):
    config = config_of(tmp_path, "llama", {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2})
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 48,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert config == expected


def test_mistral_is_a_llama_with_a_window(tmp_path):
    config = config_of(tmp_path, "llama", {"llama.attention.sliding_window": 4096})
    assert config["model_type"] == "mistral" and config["sliding_window"] == 4096
    assert config["architectures"] == ["MistralForCausalLM"]


def test_qwen(tmp_path):
    assert config_of(tmp_path, "qwen2")["attention_bias"] is True
    config = config_of(tmp_path, "qwen3")
    assert (config["head_dim"], config["attention_bias"], config["sliding_window"]) == (32, False, None)


def test_gemma(tmp_path):
    config = config_of(tmp_path, "gemma2")
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (40.0, 20.0)
    assert config["query_pre_attn_scalar"] == 32 and config["sliding_window"] == 512
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    config = config_of(tmp_path, "gemma3", {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0})
    assert config["model_type"] == "gemma3_text" and config["rope_local_base_freq"] == 10000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["attn_logit_softcapping"] is None and config["hidden_activation"] == "gelu_pytorch_tanh"


def test_phi3_longrope(tmp_path):
    short, long = np.linspace(1, 2, 6, dtype=np.float32), np.linspace(2, 60, 6, dtype=np.float32)
    config = config_of(
        tmp_path,
        "phi3",
        {"phi3.rope.dimension_count": 12, "phi3.rope.scaling.original_context_length": 1024},
        {"rope_factors_short.weight": short, "rope_factors_long.weight": long},
    )
    assert config["partial_rotary_factor"] == 0.75 and config["original_max_position_embeddings"] == 1024
    assert config["rope_scaling"]["rope_type"] == "longrope"
    np.testing.assert_array_equal(config["rope_scaling"]["long_factor"], long)


@pytest.mark.parametrize(
    ("dim", "factor", "low", "high", "original"),
    [(128, 8.0, 1.0, 4.0, 8192), (64, 32.0, 1.0, 4.0, 8192), (128, 4.0, 1.0, 3.0, 4096), (128, 16.0, 2.0, 5.0, 2048)],
)
def test_llama3_scaling_is_recovered_from_the_factors(dim, factor, low, high, original, tmp_path):
    factors = gguf_files.llama3_rope_factors(dim, 500000.0, factor, low, high, original)
    extra = {"llama.rope.dimension_count": dim, "llama.attention.key_length": dim}
    scaling = config_of(tmp_path, "llama", extra, {"rope_freqs.weight": factors})["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == factor
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    again = gguf_files.llama3_rope_factors(dim, 500000.0, scaling["factor"], *(scaling[key] for key in keys))
    np.testing.assert_allclose(again, factors, rtol=1e-4)
    if original == 8192:
        assert [scaling[key] for key in keys] == [1.0, 4.0, 8192]


def test_unknown_scaling_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        config_of(tmp_path, "llama", None, {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})
    with pytest.raises(UnsupportedModelError, match="'spiral'"):
        config_of(tmp_path, "llama", {"llama.rope.scaling.type": "spiral"})


@pytest.mark.parametrize("field", ["block_count", "attention.head_count", "embedding_length", "context_length"])
def test_missing_fields_are_named(field, tmp_path):
    with pytest.raises(CheckpointError, match=f"llama.{field}=None"):
        config_of(tmp_path, "llama", {f"llama.{field}": None})


def test_zero_heads_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count=0"):
        config_of(tmp_path, "llama", {"llama.attention.head_count": 0})


def test_generation_config_lists_every_end_of_a_turn(tmp_path):
    extra = {
        "tokenizer.ggml.tokens": ["a", "</s>", "<|eot_id|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "<|eot_id|><|im_end|>",
        "general.sampling.temp": 0.6,
    }
    gguf_files.write_model(tmp_path / "model.gguf", "llama", extra=extra)
    generation = open_checkpoint(tmp_path / "model.gguf").generation_config
    assert generation == {"eos_token_id": [1, 2], "temperature": 0.6}
