"""A decoder's shape and options, read from the contents of a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UnsupportedModelError
from jaxllm.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What every decoder-only family shares. Sizes count elements; names are those of Hugging Face's config.json.

    Attributes:
      windows: for each layer the sliding window in tokens, or None for full attention.
      rope: the rotary embedding of full-attention layers.
      local_rope: that of sliding-window layers (Gemma 3 has another base there).
      activation: "silu" or "gelu_tanh", the gate of the MLP.
      attention_scale: what query-key products are multiplied by.
      attention_cap, final_cap: soft caps of attention scores and of logits (Gemma 2), or None.
      embedding_scale: what token embeddings are multiplied by.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    rope: Rope
    local_rope: Rope
    activation: str
    attention_scale: float
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_cap: float | None = None
    final_cap: float | None = None
    embedding_scale: float = 1.0

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], **overrides: Any) -> "DecoderConfig":
        """Reads what all families write the same way; `overrides` are the family's own. Raises UnsupportedModelError
        naming the field that is missing or not supported."""

        def required(name: str) -> Any:
            if hf.get(name) is None:
                raise UnsupportedModelError(f"config.json has no {name!r}")
            return hf[name]

        heads = required("num_attention_heads")
        head_dim = hf.get("head_dim") or required("hidden_size") // heads
        layers = required("num_hidden_layers")
        max_position = hf.get("max_position_embeddings") or 2048
        rope = Rope.from_hf(hf, head_dim, max_position)
        fields: dict[str, Any] = dict(
            vocab_size=required("vocab_size"),
            hidden_size=required("hidden_size"),
            intermediate_size=required("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            max_position_embeddings=max_position,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            windows=(None,) * layers,
            rope=rope,
            local_rope=rope,
            activation=activation_of(hf.get("hidden_activation") or hf.get("hidden_act") or "silu"),
            attention_scale=head_dim**-0.5,
        )
        return cls(**{**fields, **overrides})


def activation_of(name: str) -> str:
    """Hugging Face's name of the MLP's gate to ours. Raises UnsupportedModelError for others."""
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if name not in names:
        raise UnsupportedModelError(f"hidden_act={name!r} is not supported; supported are {', '.join(names)}")
    return names[name]
