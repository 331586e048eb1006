"""The decoder-only transformer that families fill in: embeddings, layers over paged caches, norm, logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.models.config import DecoderConfig
from jaxllm.models.layers import (
    Attention,
    Embedding,
    GatedMLP,
    Linear,
    RMSNorm,
    RopeTables,
    can_deal_out_stream,
    linear,
    stream_rows,
    summand,
)
from jaxllm.models.metadata import LinearMetadata, StepMetadata
from pallas_kernels import argmax_projection as argmax
from sharding import num_shards, shard_start


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of each token on a tensor-parallel shard: `num_kv_heads` keys and values of `head_dim`, for
    the last `window` tokens (None: all). Layers of one `group` share page tables."""

    group: int
    window: int | None
    num_kv_heads: int
    head_dim: int


class DecoderLayer(nnx.Module):
    """Llama's layer: attention and MLP, each over the norm of the residual stream.

    A layer takes the stream and the update that is still to be added to it, and leaves both so: the sum and the norm
    that follows it are one pass over memory. What follows its attention is a part of its own (`finish`), since the last
    layer may do it for some of the tokens only.

    `deals_out_stream`: all that it adds to the stream goes through `summand` and `RMSNorm.add`, which can do with each
    shard's rows of it.
    """

    deals_out_stream = True

    def __init__(self, config: DecoderConfig, *, window: int | None, group: int, dtype):
        self.input_layernorm = RMSNorm.over_hidden(config, dtype=dtype)
        self.self_attn = Attention(config, window=window, group=group, dtype=dtype)
        self.post_attention_layernorm = RMSNorm.over_hidden(config, dtype=dtype)
        self.mlp = GatedMLP(config, dtype=dtype)

    def attend(
        self, stream: jax.Array, update: jax.Array, rope: RopeTables, cache: jax.Array, metadata: StepMetadata
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The stream with the update [T, embed], what its tokens attended to [T, heads * head_dim], and the cache."""
        stream, x = self.input_layernorm.add(stream, update, metadata)
        attended, cache = self.self_attn(x, rope, cache, metadata)
        return stream, attended, cache

    def finish(self, stream: jax.Array, attended: jax.Array, metadata: StepMetadata) -> tuple[jax.Array, jax.Array]:
        """The stream and the update to it, both [R, embed], of R rows of what `attend` has left; the update may be in
        parts (`layers.summand`)."""
        update = summand(attended, self.self_attn.o_proj, metadata)
        stream, x = self.post_attention_layernorm.add(stream, update, metadata)
        return stream, summand(self.mlp(x, metadata), self.mlp.down_proj, metadata)


@jax.jit
def _attend(layer, stream, update, rope, cache, metadata):
    """A jit of its own, as `_finish`, so that layers of one structure are traced once."""
    return layer.attend(stream, update, rope, cache, metadata)


@jax.jit
def _finish(layer, stream, attended, metadata):
    return layer.finish(stream, attended, metadata)


class DecoderStack(nnx.Module):
    """`model.*` of a Hugging Face checkpoint."""

    def __init__(self, config: DecoderConfig, layer_type, groups: tuple[int, ...], *, dtype):
        self.embed_tokens = Embedding(config, dtype=dtype)
        layers = [
            layer_type(config, window=window, group=group, dtype=dtype)
            for window, group in zip(config.windows, groups, strict=True)
        ]
        self.layers = nnx.List(layers)
        self.norm = RMSNorm.over_hidden(config, dtype=dtype)


class CausalLM(nnx.Module):
    """A causal language model. Families define `parse_config`, and `layer_type` where their layers are not Llama's."""

    layer_type: type[DecoderLayer] = DecoderLayer

    @classmethod
    def parse_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        """The family's reading of a config.json. Raises UnsupportedModelError naming the field at fault."""
        raise NotImplementedError

    def __init__(self, config: DecoderConfig, *, dtype):
        windows = sorted(set(config.windows), key=lambda window: (window is not None, window))
        groups = tuple(windows.index(window) for window in config.windows)
        self.config = config
        self.model = DecoderStack(config, self.layer_type, groups, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size,
                {"lm_head": config.vocab_size},
                dtype=dtype,
                axes=("embed", "vocab"),
                shards=config.tensor_shards,
            )
        )

    def deals_out_stream(self, dtype: DTypeLike, shards: int, backend: str) -> bool:
        """Whether its residual stream's rows can be dealt out among so many shards."""
        return self.layer_type.deals_out_stream and can_deal_out_stream(self.config.hidden_size, dtype, shards, backend)

    def layer_caches(self) -> tuple[LayerCache, ...]:
        """What each layer keeps; group numbers count from 0, full attention first."""
        attentions = [layer.self_attn for layer in self.model.layers]
        return tuple(LayerCache(a.group, a.window, a.kv_heads, a.head_dim) for a in attentions)

    def __call__(self, token_ids: jax.Array, caches: list[jax.Array], metadata: StepMetadata):
        """int32[T] token ids to the normalized hidden rows [T, embed], or [R, embed] of `metadata.output_rows`, and the
        caches with the new tokens in them."""
        rows = metadata.output_rows
        axis = metadata.stream_axis
        dtype = self.model.norm.weight[...].dtype
        if axis is not None and not self.deals_out_stream(dtype, num_shards(axis), metadata.backend):
            axis = None
        metadata = dataclasses.replace(metadata, output_rows=None, stream_axis=axis)
        embed = self.model.embed_tokens
        hidden = embed(token_ids) if axis is None else embed.part(token_ids)
        if self.config.embedding_scale != 1.0:
            hidden = hidden * jnp.asarray(self.config.embedding_scale, hidden.dtype)
        config = self.config
        rope = config.rope.tables(metadata.positions)
        local = rope if config.local_rope == config.rope else config.local_rope.tables(metadata.positions)
        own = -(-len(token_ids) // num_shards(axis))
        stream, updated = jnp.zeros((own, hidden.shape[1]), hidden.dtype), []
        peers, metadata = metadata.peers, dataclasses.replace(metadata, peers=None)  # the first sum exchanges addresses
        for layer, cache in zip(self.model.layers, caches, strict=True):
            tables = rope if layer.self_attn.window is None else local
            stream, attended, cache = _attend(layer, stream, hidden, tables, cache, metadata)
            metadata = dataclasses.replace(metadata, peers=peers)
            updated.append(cache)
            if rows is not None and len(updated) == len(caches):
                stream, attended = stream_rows(stream, rows, metadata), attended[rows]
                metadata = dataclasses.replace(metadata, linear=metadata.linear.take(rows), stream_axis=None)
            stream, hidden = _finish(layer, stream, attended, metadata)
        return self.model.norm.add(stream, hidden, metadata)[1], updated

    @property
    def head(self) -> nnx.Module:
        """What holds the parameters of `logits`."""
        return self.lm_head or self.model.embed_tokens

    def logits(self, hidden: jax.Array, metadata: LinearMetadata) -> jax.Array:
        """[R, embed] normalized hidden rows to float32[R, vocab], the shard's part of a vocabulary in shards."""
        if self.lm_head is None:
            logits = self.model.embed_tokens.logits(hidden)
        else:
            # Not rounded to x's dtype in between: in bfloat16 the likeliest tokens would often be equal.
            logits = linear(hidden, self.lm_head, metadata, jnp.float32)
        cap = self.config.final_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def likeliest(self, hidden: jax.Array, backend: str) -> tuple[jax.Array, jax.Array] | None:
        """The largest logit of each row in the shard's part of the vocabulary and the lowest id that has it, as
        `argmax_projection` returns them, of [R, embed] normalized hidden rows. None: no kernel finds them without
        writing logits."""
        by_columns = self.lm_head is None
        weight = self.model.embed_tokens.weight[...] if self.lm_head is None else self.lm_head.kernel[...]
        has_bias = self.lm_head is not None and self.lm_head.bias is not None
        if has_bias or not argmax.has_kernel(hidden, weight, backend, by_columns=by_columns):
            return None
        width = weight.shape[0 if by_columns else 1]
        start = shard_start(width, self.model.embed_tokens.axis)
        num_valid = jnp.clip(self.config.vocab_size - start, 0, width)
        largest, columns = argmax.argmax_projection(
            hidden, weight, num_valid, by_columns=by_columns, cap=self.config.final_cap, backend=backend
        )
        return largest, columns + start
