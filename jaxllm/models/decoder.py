"""The decoder-only transformer that families fill in: embeddings, layers over paged caches, norm, logits."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.config import DecoderConfig
from jaxllm.models.layers import Attention, Embedding, GatedMLP, Linear, RMSNorm, RopeTables, linear
from jaxllm.models.metadata import LinearMetadata, StepMetadata


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of each token: `num_kv_heads` keys and values of `head_dim`, for the last `window` tokens
    (None: all). Layers of one `group` share page tables."""

    group: int
    window: int | None
    num_kv_heads: int
    head_dim: int


class DecoderLayer(nnx.Module):
    """Norm, attention, residual; norm, MLP, residual: Llama's layer."""

    def __init__(self, config: DecoderConfig, *, window: int | None, group: int, dtype):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, window=window, group=group, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, dtype=dtype)

    def __call__(self, hidden, rope: RopeTables, cache, metadata: StepMetadata) -> tuple[jax.Array, jax.Array]:
        attended, cache = self.self_attn(self.input_layernorm(hidden), rope, cache, metadata)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden), metadata), cache


@jax.jit
def _run_layer(layer, hidden, rope, cache, metadata):
    """A jit of its own, so that layers of one structure are traced once."""
    return layer(hidden, rope, cache, metadata)


class DecoderStack(nnx.Module):
    """`model.*` of a Hugging Face checkpoint."""

    def __init__(self, config: DecoderConfig, layer_type, groups: tuple[int, ...], *, dtype, unit_offset: bool):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        layers = [
            layer_type(config, window=window, group=group, dtype=dtype)
            for window, group in zip(config.windows, groups, strict=True)
        ]
        self.layers = nnx.List(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, unit_offset=unit_offset)


class CausalLM(nnx.Module):
    """A causal language model. Families set `config_type`, `layer_type` and `unit_offset` (norms stored less one)."""

    config_type = DecoderConfig
    layer_type = DecoderLayer
    unit_offset = False

    def __init__(self, config: DecoderConfig, *, dtype):
        windows = sorted(set(config.windows), key=lambda window: (window is not None, window))
        groups = tuple(windows.index(window) for window in config.windows)
        self.config = config
        self.model = DecoderStack(config, self.layer_type, groups, dtype=dtype, unit_offset=self.unit_offset)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, {"lm_head": config.vocab_size}, dtype=dtype, axes=("embed", "vocab"))
        )

    def layer_caches(self) -> tuple[LayerCache, ...]:
        """What each layer keeps; group numbers count from 0, full attention first."""
        attentions = [layer.self_attn for layer in self.model.layers]
        return tuple(LayerCache(a.group, a.window, a.kv_heads, a.head_dim) for a in attentions)

    def __call__(self, token_ids: jax.Array, caches: list[jax.Array], metadata: StepMetadata):
        """int32[T] token ids to the normalized hidden rows [T, embed], and the caches with the new tokens in them."""
        hidden = self.model.embed_tokens(token_ids)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * jnp.asarray(self.config.embedding_scale, hidden.dtype)
        attention = metadata.attention[0]
        kv_lengths = attention.kv_lens[attention.row_ids]
        rope = self.config.rope.tables(metadata.positions, kv_lengths)
        local = self.config.local_rope.tables(metadata.positions, kv_lengths)
        updated = []
        for layer, cache in zip(self.model.layers, caches, strict=True):
            tables = rope if layer.self_attn.window is None else local
            hidden, cache = _run_layer(layer, hidden, tables, cache, metadata)
            updated.append(cache)
        return self.model.norm(hidden), updated

    def logits(self, hidden: jax.Array, metadata: LinearMetadata) -> jax.Array:
        """[R, embed] normalized hidden rows to float32[R, vocab]."""
        if self.lm_head is None:
            logits = self.model.embed_tokens.logits(hidden)
        else:
            logits = linear(hidden, self.lm_head, metadata).astype(jnp.float32)
        cap = self.config.final_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
