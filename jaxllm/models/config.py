"""A decoder's shape and options, read from the contents of a Hugging Face config.json."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"

# Hugging Face's name of the MLP's gate to ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

# Fields that change the result wherever they are set, which no family here implements; None, False and 0 are harmless.
_REFUSED = (
    "quantization_config",
    "compression_config",
    "use_bidirectional_attention",
    "dual_chunk_attention_config",
    "is_encoder_decoder",
    "add_cross_attention",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What every decoder-only family shares. Sizes count elements; names are those of Hugging Face's config.json.

    Attributes:
      windows: for each layer the sliding window in tokens, or None for full attention.
      rope: the rotary embedding of full-attention layers.
      local_rope: that of sliding-window layers (Gemma 3 has another base there).
      activation: "silu", "gelu" or "gelu_tanh", the gate of the MLP.
      attention_scale: what query-key products are multiplied by.
      attention_bias, attention_out_bias, mlp_bias: which projections have biases: q, k and v; o; all three of the MLP.
      qk_norm: queries and keys are normalized, head by head, before they are rotated.
      norm_unit_offset: norms are stored less one (Gemma).
      fused_projections: the checkpoint holds qkv_proj and gate_up_proj (Phi-3).
      attention_cap, final_cap: soft caps of attention scores and of logits (Gemma 2), or None.
      embedding_scale: what token embeddings are multiplied by.
      tensor_shards: among how many devices heads, MLP and vocabulary are dealt out; see `for_shards`.
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
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_unit_offset: bool = False
    fused_projections: bool = False
    attention_cap: float | None = None
    final_cap: float | None = None
    embedding_scale: float = 1.0
    tensor_shards: int = 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, partial_rotary: bool = False, **overrides: Any) -> "DecoderConfig":
        """Reads what all families write the same way.

        Args:
          hf: the contents of config.json over the family's defaults.
          partial_rotary: the family knows partial_rotary_factor.
          overrides: fields that the family reads for itself.

        Raises:
          UnsupportedModelError: names the field that is missing, malformed or not supported.
        """
        for name in _REFUSED:
            if hf.get(name):
                raise UnsupportedModelError(f"config.json: {name}={hf[name]!r} is not supported")
        hidden, layers, heads = (integer(hf, f) for f in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        kv_heads = integer(hf, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"config.json: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}"
            )
        head_dim = integer(hf, "head_dim", hidden // heads)
        max_position = integer(hf, "max_position_embeddings", 2048)
        rope = Rope.from_hf(rope_parameters(hf, FULL), head_dim, max_position)
        local_rope = Rope.from_hf(rope_parameters(hf, SLIDING), head_dim, max_position)
        if not partial_rotary and {len(rope.inverse_frequencies), len(local_rope.inverse_frequencies)} != {
            head_dim // 2
        }:
            raise UnsupportedModelError("config.json: partial_rotary_factor is not supported in this family")
        fields: dict[str, Any] = dict(
            vocab_size=integer(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer(hf, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive_float(hf, "rms_norm_eps", 1e-6),
            max_position_embeddings=max_position,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            windows=(None,) * layers,
            rope=rope,
            local_rope=local_rope,
            activation=activation_of(hf, "hidden_act"),
            attention_scale=head_dim**-0.5,
        )
        return cls(**{**fields, **overrides})

    def for_length(self, max_length: int) -> "DecoderConfig":
        """The same where no sequence has more than `max_length` tokens; see `Rope.for_length`. As read, the config is
        for `max_position_embeddings`."""
        return dataclasses.replace(
            self, rope=self.rope.for_length(max_length), local_rope=self.local_rope.for_length(max_length)
        )

    def for_shards(self, count: int) -> "DecoderConfig":
        """The same, dealt out among `count` tensor-parallel shards. Key-value heads that are fewer than the shards are
        replicated, the vocabulary is padded; query heads and the MLP have to be divisible.

        Raises:
          ConfigError: they are not; it names the counts that would do.
        """
        if not self._can_be_cut(count):
            allowed = ", ".join(map(str, self.shard_counts))
            raise ConfigError(
                f"tensor_parallel_size={count}: must divide num_attention_heads={self.num_attention_heads} and "
                f"intermediate_size={self.intermediate_size}, and divide num_key_value_heads="
                f"{self.num_key_value_heads} or be a multiple of it; this model allows {allowed}"
            )
        return dataclasses.replace(self, tensor_shards=count)

    @property
    def shard_counts(self) -> list[int]:
        """The counts that `for_shards` takes."""
        return [count for count in range(1, self.num_attention_heads + 1) if self._can_be_cut(count)]

    def meshes(self, devices: int) -> list[tuple[int, int]]:
        """(data, tensor), by their ranks: the meshes of exactly so many devices over which the model divides."""
        return [(devices // size, size) for size in reversed(self.shard_counts) if devices % size == 0]

    def _can_be_cut(self, count: int) -> bool:
        heads_and_mlp = self.num_attention_heads % count == 0 and self.intermediate_size % count == 0
        return heads_and_mlp and (self.num_key_value_heads % count == 0 or count % self.num_key_value_heads == 0)

    @property
    def kv_copies(self) -> int:
        """On how many shards each key-value head stands."""
        return max(1, self.tensor_shards // self.num_key_value_heads)

    @property
    def shard_vocab(self) -> int:
        """Vocabulary ids of one shard; the last shards' may lie beyond the vocabulary."""
        return -(-self.vocab_size // self.tensor_shards)


def integer(hf: Mapping[str, Any], name: str, default: int | None = None, *, minimum: int = 1) -> int:
    """The integer of this name, or the default where it is absent or null. Raises UnsupportedModelError."""
    value = default if hf.get(name) is None else hf[name]
    if value is None:
        raise UnsupportedModelError(f"config.json: {name} is missing")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < minimum or value != int(value):
        raise UnsupportedModelError(f"config.json: {name}={value!r}: must be an integer of at least {minimum}")
    return int(value)


def positive_float(hf: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """The positive number of this name, or the default where it is absent or null. Raises UnsupportedModelError."""
    value = default if hf.get(name) is None else hf[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"config.json: {name}={value!r}: must be a positive number")
    return float(value)


def activation_of(hf: Mapping[str, Any], name: str) -> str:
    """The MLP's gate by our name. Raises UnsupportedModelError for others."""
    value = hf.get(name) or "silu"
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedModelError(f"config.json: {name}={value!r}; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def layer_windows(hf: Mapping[str, Any], is_sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Each layer's window: `sliding_window` in the layers that `layer_types` names or, without it, `is_sliding` picks.

    Raises:
      UnsupportedModelError: layer_types of another length or with other kinds, or sliding layers without a window.
    """
    layers = integer(hf, "num_hidden_layers")
    types = hf.get("layer_types")
    if types is None:
        types = [SLIDING if is_sliding(layer) else FULL for layer in range(layers)]
    is_known = isinstance(types, list | tuple) and all(kind in (FULL, SLIDING) for kind in types)
    if not is_known or len(types) != layers:
        raise UnsupportedModelError(f"config.json: layer_types={types!r}: must be {layers} of {FULL} and {SLIDING}")
    if SLIDING not in types:
        return (None,) * layers
    if hf.get("sliding_window") is None:
        use = f" with use_sliding_window={hf['use_sliding_window']!r}" if "use_sliding_window" in hf else ""
        raise UnsupportedModelError(f"config.json: layer_types names sliding layers, but sliding_window is none{use}")
    window = integer(hf, "sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)


def rope_parameters(hf: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """The rotary embedding's parameters for one type of layer, as transformers 5 writes them (`rope_parameters`, nested
    by layer type where they differ), be they written so or as transformers 4 did (`rope_scaling`, `rope_theta`, …)."""
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    found = hf.get(field) or {}
    if isinstance(found, Mapping) and (FULL in found or SLIDING in found):
        found = found.get(layer_type) or {}
    if not isinstance(found, Mapping):
        raise UnsupportedModelError(f"config.json: {field}={hf[field]!r}: must hold rope parameters by name")
    result = {name: value for name, value in found.items() if value is not None}
    for name in ("rope_theta", "partial_rotary_factor"):
        if hf.get(name) is not None:
            result.setdefault(name, hf[name])
    # Phi-3 keeps it outside, and there it counts for more
    if hf.get("original_max_position_embeddings") is not None:
        result["original_max_position_embeddings"] = hf["original_max_position_embeddings"]
    return result
