"""GGUF metadata as the config.json and generation_config.json that Hugging Face would hold.

The keys are those of llama.cpp (`gguf-py/gguf/constants.py`, `convert_hf_to_gguf.py`); what a file leaves out is what
llama.cpp itself assumes, named where it is used.
"""

from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf_fields import Fields
from jaxllm.checkpoint.gguf_format import GgufFile
from jaxllm.checkpoint.gguf_rope import rope_scaling
from jaxllm.errors import CheckpointError, UnsupportedModelError

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
    if Fields(file, name).number("expert_count"):
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
    fields = Fields(file, arch)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing or no matrix")
    num_layers, heads = fields.integer("block_count"), fields.integer("attention.head_count")
    if num_layers > (most := len(file.tensors)):
        raise CheckpointError(f"{file.path}: {arch}.block_count={num_layers} exceeds the file's {most} tensors")
    hidden = fields.integer("embedding_length")
    # rope.dimension_count may be a part of the head in other architectures
    rotated = fields.number("rope.dimension_count") if arch == "llama" else None
    head_dim = fields.integer("attention.key_length", rotated or hidden // heads)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.positive("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": fields.positive("rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, fields, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        # quantized files do not say what they were made from; nearly all such models were published in bfloat16
        "torch_dtype": {"F32": "float32", "F16": "float16"}.get(embedding.type_name, "bfloat16"),
    }
    _ADAPT[arch](config, fields, file)
    config.update(_token_ids(file))
    return config


def _llama(config: dict[str, Any], fields: Fields, file: GgufFile) -> None:
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if window := fields.number("attention.sliding_window"):
        config.update(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window)


def _qwen(config: dict[str, Any], fields: Fields, file: GgufFile) -> None:
    config.update(use_sliding_window=False, sliding_window=None)


def _gemma(config: dict[str, Any], fields: Fields, file: GgufFile) -> None:
    arch = architecture(file)
    num_layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    wide = num_layers == _WIDE_SCALE_LAYERS[arch]
    period = 2 if arch == "gemma2" else 6
    del config["hidden_act"]
    config.update(
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=config["hidden_size"] // heads if wide else config["head_dim"],
        sliding_window=fields.integer("attention.sliding_window", 4096 if arch == "gemma2" else 1024),
        layer_types=["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)],
        attn_logit_softcapping=fields.number("attn_logit_softcapping", 50.0 if arch == "gemma2" else None),
        final_logit_softcapping=fields.number("final_logit_softcapping", 30.0 if arch == "gemma2" else None),
    )
    if arch == "gemma3":
        config["rope_theta"] = fields.positive("rope.freq_base", 1000000.0)
        config["rope_local_base_freq"] = fields.positive("rope.freq_base_swa", 10000.0)


def _phi3(config: dict[str, Any], fields: Fields, file: GgufFile) -> None:
    config["sliding_window"] = fields.number("attention.sliding_window") or None
    config["original_max_position_embeddings"] = fields.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    rotated = fields.integer("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]


_ADAPT = {"llama": _llama, "qwen2": _qwen, "qwen3": _qwen, "gemma2": _gemma, "gemma3": _gemma, "phi3": _phi3}


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _token_ids(file: GgufFile) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {field: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for field, name in names.items()}
    return {field: value for field, value in ids.items() if _is_token(value)}


def make_generation_config(file: GgufFile) -> dict[str, Any]:
    """The contents of generation_config.json: token ids, every end of a turn among them, and sampling defaults.

    Ends of a turn are eos_token_id, eot_token_id and eom_token_id, and any control token of a known name that the
    chat template writes.
    """
    metadata = file.metadata
    config = _token_ids(file)
    listed = [config.get("eos_token_id"), *(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    ends = [token for token in listed if _is_token(token)]
    template, tokens = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if isinstance(template, str) and isinstance(tokens, list) and isinstance(kinds, np.ndarray):
        found = [tokens.index(text) for text in _END_OF_TURN if text in template and text in tokens]
        ends += [token for token in found if token < len(kinds) and kinds[token] == _CONTROL]
    ends = list(dict.fromkeys(ends))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    sampling = Fields(file, "general.sampling")
    for field, key in {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}.items():
        if (value := sampling.number(key)) is not None:
            config[field] = value
    return config
