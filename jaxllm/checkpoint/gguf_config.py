"""GGUF metadata as the config.json and generation_config.json that Hugging Face would hold.

The keys are those of llama.cpp (`gguf-py/gguf/constants.py`, `convert_hf_to_gguf.py`); what a file leaves out is what
llama.cpp itself assumes, named where it is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf_format import GgufFile
from jaxllm.checkpoint.gguf_rope import rope_scaling
from jaxllm.errors import CheckpointError, UnsupportedModelError

Getter = Callable[..., Any]

# GGUF architecture -> (model_type, class name in config.json)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
# Layers of the one size (27B) whose attention scale is not 1/sqrt(head_dim) but 1/sqrt(hidden_size/heads).
_WIDE_SCALE_LAYERS = {"gemma2": 46, "gemma3": 62}
# Ends of a turn that chat templates write and old files forget to list beside eos_token_id.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
_CONTROL = 3


def plain(value: Any) -> Any:
    """Floats by their shortest decimal: 9.999999747378752e-06 of a float32 field is 1e-05 in config.json."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def architecture(file: GgufFile) -> str:
    """The file's architecture.

    Raises:
      CheckpointError: it names none.
      UnsupportedModelError: it is not one of `ARCHITECTURES`, or a mixture of experts.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{file.path}: general.architecture is missing: not a language model")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: architecture {name!r}; jaxllm reads GGUF files of {', '.join(ARCHITECTURES)}"
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise UnsupportedModelError(f"{file.path}: {name} with experts; jaxllm reads dense GGUF models only")
    return name


def make_config(file: GgufFile) -> dict[str, Any]:
    """The contents of config.json in Hugging Face terms.

    Raises:
      CheckpointError: a field that every model has is missing or is no positive number.
      UnsupportedModelError: see `architecture`.
    """
    arch = architecture(file)
    model_type, class_name = ARCHITECTURES[arch]
    metadata = file.metadata

    def get(key: str, default: Any = None) -> Any:
        return plain(metadata.get(f"{arch}.{key}", default))

    def integer(key: str, default: int | None = None) -> int:
        value = get(key, default)
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"{file.path}: {arch}.{key}={value!r}: must be a positive integer")
        return value

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing or no matrix")
    num_layers, heads = integer("block_count"), integer("attention.head_count")
    hidden = integer("embedding_length")
    head_dim = integer("attention.key_length", get("rope.dimension_count") if arch == "llama" else hidden // heads)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, arch, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        # quantized files do not say what they were made from; nearly all such models were published in bfloat16
        "torch_dtype": {"F32": "float32", "F16": "float16"}.get(embedding.type_name, "bfloat16"),
    }
    _ADAPT[arch](config, get, file)
    config.update(_token_ids(file))
    return config


def _llama(config: dict[str, Any], get: Getter, file: GgufFile) -> None:
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if window := get("attention.sliding_window"):
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)


def _qwen(config: dict[str, Any], get: Getter, file: GgufFile) -> None:
    config.update(use_sliding_window=False, sliding_window=None)


def _gemma(config: dict[str, Any], get: Getter, file: GgufFile) -> None:
    arch = architecture(file)
    num_layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    wide = num_layers == _WIDE_SCALE_LAYERS[arch]
    period = 2 if arch == "gemma2" else 6
    del config["hidden_act"]
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=config["hidden_size"] // heads if wide else config["head_dim"],
        sliding_window=get("attention.sliding_window", 4096 if arch == "gemma2" else 1024),
        layer_types=["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)],
        attn_logit_softcapping=get("attn_logit_softcapping", 50.0 if arch == "gemma2" else None),
        final_logit_softcapping=get("final_logit_softcapping", 30.0 if arch == "gemma2" else None),
    )
    if arch == "gemma3":
        config["rope_theta"] = get("rope.freq_base", 1000000.0)
        config["rope_local_base_freq"] = get("rope.freq_base_swa", 10000.0)


def _phi3(config: dict[str, Any], get: Getter, file: GgufFile) -> None:
    config["sliding_window"] = get("attention.sliding_window") or None
    config["original_max_position_embeddings"] = get(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    rotated = get("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]


_ADAPT = {"llama": _llama, "qwen2": _qwen, "qwen3": _qwen, "gemma2": _gemma, "gemma3": _gemma, "phi3": _phi3}


def _token_ids(file: GgufFile) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {field: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for field, name in names.items()}
    return {field: value for field, value in ids.items() if isinstance(value, int)}


def make_generation_config(file: GgufFile) -> dict[str, Any]:
    """The contents of generation_config.json: token ids, every end of a turn among them, and sampling defaults.

    Ends of a turn are eos_token_id, eot_token_id and eom_token_id, and any control token of a known name that the
    chat template writes.
    """
    metadata = file.metadata
    config = _token_ids(file)
    ends = [config["eos_token_id"]] if "eos_token_id" in config else []
    ends += [metadata[key] for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id") if key in metadata]
    template = metadata.get("tokenizer.chat_template", "")
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", ())
    for text in _END_OF_TURN:
        if isinstance(template, str) and text in template and text in tokens:
            token = tokens.index(text)
            ends += [token] if token < len(kinds) and kinds[token] == _CONTROL else []
    ends = list(dict.fromkeys(ends))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for field, key in {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}.items():
        value = metadata.get(f"general.sampling.{key}")
        if isinstance(value, (int, float)):
            config[field] = plain(value)
    return config
