"""The pieces that families are built from. Parameters are abstract (ShapeDtypeStruct) until a loader fills them.

Each parameter says in its metadata where it comes from and how it may be sharded:
  sources: the slices of a Hugging Face checkpoint's tensors that are joined along the last axis, see `sources.Source`;
    names are relative to the parent of the module. Absent where the parameter's own path is its name.
  stored: the tensor's shape in the checkpoint, where padding for the shards makes it another.
  transpose: the checkpoint holds it as [out, in].
  init: "zeros" or "ones" where dummy weights are not random.
  axes: logical axis names, one a dimension (see `sharding`).
  shards: how many tensor-parallel shards it is cut into, if an axis is dealt out among them.

Shapes of parameters are those of all shards together; inside the step's `shard_map` a module sees its shard's part.
Other sizes that a module keeps (heads, slices) are those of one shard.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxllm.models.config import DecoderConfig
from jaxllm.models.metadata import LinearMetadata, StepMetadata
from jaxllm.models.rope import rotate, rotate_leading
from jaxllm.models.sources import Source
from pallas_kernels import add_rms_norm as norms
from pallas_kernels import all_reduce_rms_norm as sums
from pallas_kernels import gated_matmul as gating
from pallas_kernels import qk_norm_rope as qk
from pallas_kernels import qkv_projection as qkv_kernel
from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from sharding import RULES, TENSOR, shard_start, sum_over

RopeTables = tuple[jax.Array, jax.Array]


def parameter(shape: tuple[int, ...], dtype, axes: tuple[str | None, ...], *, shards: int = 1, **metadata) -> nnx.Param:
    """An abstract parameter with its sharding axes and its place in a checkpoint."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, shards=shards, **metadata)


class Linear(nnx.Module):
    """A projection [in, out], or several fused along their outputs; `slices` are their logical widths on one shard, in
    order.

    Column-parallel where its outputs are dealt out among the shards, interleaved by shard if it is fused; row-parallel
    where its inputs are: then `sums_over` names the mesh axis over which the shards' products are summed.

    Args:
      slices: checkpoint name and width of each output slice.
      source: the checkpoint's own name where it stores the slices fused already.
      shards: tensor-parallel shards.
      copies: on how many shards each piece of a slice stands, for slices that have fewer pieces than shards.
    """

    def __init__(
        self,
        in_features: int,
        slices: Mapping[str, int],
        *,
        dtype,
        axes: tuple[str, str],
        bias: bool = False,
        source: str | None = None,
        shards: int = 1,
        copies: Mapping[str, int] | None = None,
    ):
        columns = shards if RULES[axes[1]] == TENSOR else 1
        self.sums_over = TENSOR if shards > 1 and RULES[axes[0]] == TENSOR else None

        def sources(kind: str) -> tuple[Source, ...]:
            found, start = [], 0
            for name, width in slices.items():
                stored = f"{source or name}.{kind}"
                found.append(Source(stored, width, start if source else 0, (copies or {}).get(name, 1)))
                start += width
            return tuple(found)

        self.slices = tuple(part.shard_width(columns) for part in sources("weight"))
        shape = (in_features, columns * sum(self.slices))
        self.kernel = parameter(shape, dtype, axes, shards=shards, sources=sources("weight"), transpose=True)
        self.bias = parameter(shape[1:], dtype, axes[1:], shards=shards, sources=sources("bias")) if bias else None


def linear(x: jax.Array, weight: Linear, metadata: LinearMetadata, dtype: DTypeLike | None = None) -> jax.Array:
    """[T, in] to [T, out]; where activations meet projection weights, but for those that a kernel joins with what
    comes behind (`summand`, `gated`, `Attention._projected`). `dtype`: of the result, x's if
    None; sums are taken in float32 in any case."""
    y = sum_over(jnp.dot(x, weight.kernel[...], preferred_element_type=dtype), weight.sums_over)
    return y if weight.bias is None else y + weight.bias[...]


def summand(x: jax.Array, weight: Linear, metadata: StepMetadata) -> jax.Array:
    """`linear` for `RMSNorm.add` alone: [T, out], or the parts of it that its kernel adds up; where the stream is dealt
    out, a shard's part."""
    if metadata.stream_axis is not None:
        y = jnp.dot(x, weight.kernel[...])
        if weight.bias is None:
            return y
        return y + jnp.where(shard_start(1, metadata.stream_axis) == 0, weight.bias[...], 0)  # once in the sum
    if weight.bias is None and weight.sums_over is None:
        return norms.product(x, weight.kernel[...], metadata.backend)
    return linear(x, weight, metadata.linear)


def gated(x: jax.Array, weight: Linear, activation: str, metadata: StepMetadata) -> jax.Array:
    """act(gate(x)) * up(x) of a fused projection [in, 2 out]: [T, in] to [T, out]; one kernel where there is one."""
    kernel, backend, of_decodes = weight.kernel[...], metadata.backend, metadata.attention[0].decodes_only
    if weight.bias is None and gating.has_kernel(x, kernel, activation, backend, of_decodes=of_decodes):
        return gating.gated_matmul(x, kernel, activation=activation, backend=backend)
    gate, up = split(linear(x, weight, metadata.linear), weight)
    return gating.ACTIVATIONS[activation](gate) * up


def split(y: jax.Array, weight: Linear) -> list[jax.Array]:
    """The logical slices of a fused projection's output."""
    starts = [sum(weight.slices[:i]) for i in range(len(weight.slices))]
    return [y[:, start : start + width] for start, width in zip(starts, weight.slices, strict=True)]


def _own_rows(table: jax.Array, ids: jax.Array, axis: str | None) -> jax.Array:
    """int32[R] to [R, H] of a table [N, H] whose rows are dealt out among the shards of `axis`, in equal runs: zeros
    where another shard has the row."""
    if axis is None:
        return table[ids]
    rows = ids - shard_start(table.shape[0], axis)
    mine = (rows >= 0) & (rows < table.shape[0])
    return jnp.where(mine[:, None], table[jnp.where(mine, rows, 0)], 0)


def can_deal_out_stream(width: int, dtype: DTypeLike, shards: int, backend: str) -> bool:
    """Whether `RMSNorm.add` can sum over so many shards into a stream of which each has some rows."""
    return sums.has_kernel(width, dtype, shards, _sums_backend(backend))


def _sums_backend(backend: str) -> str:
    return "gpu" if backend == "gpu" else "reference"


def stream_rows(stream: jax.Array, ids: jax.Array, metadata: StepMetadata) -> jax.Array:
    """int32[R] to these rows of the residual stream, [R, embed], on each shard, also where it is dealt out."""
    return sum_over(_own_rows(stream, ids, metadata.stream_axis), metadata.stream_axis)


class RMSNorm(nnx.Module):
    """Root mean square normalization in float32 (Zhang and Sennrich, 2019).

    `unit_offset`: the weight is stored less one and multiplied before rounding (Gemma); otherwise after.
    """

    def __init__(self, size: int, eps: float, *, dtype, unit_offset: bool = False):
        self.weight = parameter((size,), dtype, (None,), init="zeros" if unit_offset else "ones")
        self.eps, self.unit_offset = eps, unit_offset

    @classmethod
    def over_hidden(cls, config: DecoderConfig, *, dtype) -> "RMSNorm":
        """The family's norm of hidden rows."""
        return cls(config.hidden_size, config.rms_norm_eps, dtype=dtype, unit_offset=config.norm_unit_offset)

    def __call__(self, x: jax.Array) -> jax.Array:
        return norms.rms_norm(x, self.weight[...], eps=self.eps, unit_offset=self.unit_offset)

    def add(self, x: jax.Array, update: jax.Array, metadata: StepMetadata) -> tuple[jax.Array, jax.Array]:
        """(x + update, its norm) of rows [T, H], in one pass where the step's backend has a kernel for it; the update
        may be what `summand` returns. Of a stream that is dealt out, x are this shard's rows."""
        if metadata.stream_axis is not None:
            return sums.all_reduce_rms_norm(
                x,
                update,
                self.weight[...],
                axis=metadata.stream_axis,
                eps=self.eps,
                unit_offset=self.unit_offset,
                peers=metadata.peers,
                backend=_sums_backend(metadata.backend),
            )
        backend = metadata.backend if norms.has_kernel(x.shape[1], x.dtype, metadata.backend) else "reference"
        return norms.add_rms_norm(
            x, update, self.weight[...], eps=self.eps, unit_offset=self.unit_offset, backend=backend
        )


class Embedding(nnx.Module):
    """Token embeddings [vocab, embed], also the output projection of models that tie the two. The vocabulary is dealt
    out among the shards in equal runs of ids."""

    def __init__(self, config: DecoderConfig, *, dtype):
        shards, hidden = config.tensor_shards, config.hidden_size
        self.weight = parameter(
            (shards * config.shard_vocab, hidden),
            dtype,
            ("vocab", "embed"),
            shards=shards,
            stored=(config.vocab_size, hidden),
        )
        self.axis = TENSOR if shards > 1 else None

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """int32[T] to [T, embed]."""
        return sum_over(self.part(token_ids), self.axis)

    def part(self, token_ids: jax.Array) -> jax.Array:
        """What this shard has of them, zeros elsewhere: int32[T] to [T, embed]."""
        return _own_rows(self.weight[...], token_ids, self.axis)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[R, embed] to float32[R, vocab]. The table stands on the left, where XLA:CPU's product is 1.3 to 1.9 times
        faster; other backends choose the layout themselves."""
        return jnp.einsum("ve,re->vr", self.weight[...], hidden, preferred_element_type=jnp.float32).T


class Attention(nnx.Module):
    """Grouped-query attention over the paged cache. `group` is the index of its cache group."""

    def __init__(self, config: DecoderConfig, *, window: int | None, group: int, dtype):
        hidden, head_dim, shards = config.hidden_size, config.head_dim, config.tensor_shards
        self.heads, self.head_dim = config.num_attention_heads // shards, head_dim
        self.kv_heads = config.num_key_value_heads * config.kv_copies // shards
        self.window, self.group = window, group
        self.scale, self.cap = config.attention_scale, config.attention_cap
        q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.qkv_proj = Linear(
            hidden,
            {"q_proj": q, "k_proj": kv, "v_proj": kv},
            dtype=dtype,
            axes=("embed", "heads"),
            bias=config.attention_bias,
            source="qkv_proj" if config.fused_projections else None,
            shards=shards,
            copies={"k_proj": config.kv_copies, "v_proj": config.kv_copies},
        )
        self.o_proj = Linear(
            q, {"o_proj": hidden}, dtype=dtype, axes=("heads", "embed"), bias=config.attention_out_bias, shards=shards
        )
        norm = functools.partial(RMSNorm, head_dim, config.rms_norm_eps, unit_offset=config.norm_unit_offset)
        self.q_norm = norm(dtype=dtype) if config.qk_norm else None
        self.k_norm = norm(dtype=dtype) if config.qk_norm else None

    def __call__(self, x, rope: RopeTables, cache, metadata: StepMetadata) -> tuple[jax.Array, jax.Array]:
        """[T, embed] to [T, heads * head_dim], which `o_proj` has still to bring back, and the cache."""
        q, k, v = self._projected(x, rope, metadata)
        out, cache = ragged_paged_attention(
            q,
            k,
            v,
            cache,
            metadata.attention[self.group],
            backend=metadata.backend,
            scale=self.scale,
            window=self.window,
            cap=self.cap,
            then=self.o_proj.kernel[...],
        )
        return out.reshape(x.shape[0], -1), cache

    @property
    def _heads(self) -> qk.Heads:
        if self.q_norm is None:
            return qk.Heads(self.heads, self.kv_heads, self.head_dim)
        return qk.Heads(self.heads, self.kv_heads, self.head_dim, self.q_norm.eps, self.q_norm.unit_offset)

    def _projected(self, x: jax.Array, rope: RopeTables, metadata: StepMetadata) -> tuple[jax.Array, ...]:
        """Queries, keys and values, each [T, heads, head_dim], of hidden rows."""
        weight, of_decodes = self.qkv_proj.kernel[...], metadata.attention[self.group].decodes_only
        backend, heads = metadata.backend, self._heads
        in_one = backend == "tpu" and self.qkv_proj.bias is None
        if in_one and qkv_kernel.has_kernel(x, weight, rope, heads, backend, of_decodes=of_decodes):
            return qkv_kernel.qkv_projection(x, weight, rope, self._norm_weights, heads, backend=backend)
        return self._rotated(linear(x, self.qkv_proj, metadata.linear), rope, backend, of_decodes)

    @property
    def _norm_weights(self) -> tuple[jax.Array, jax.Array] | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return self.q_norm.weight[...], self.k_norm.weight[...]

    def _rotated(
        self, qkv: jax.Array, rope: RopeTables, backend: str, of_decodes: bool = False
    ) -> tuple[jax.Array, ...]:
        """Queries, keys and values, each [T, heads, head_dim], from [T, out] of the projection."""
        heads = self._heads
        weights = self._norm_weights
        if backend in ("gpu", "tpu") and qk.has_kernel(
            qkv, rope, heads, backend, is_normed=weights is not None, of_decodes=of_decodes
        ):
            return qk.qk_norm_rope(qkv, rope, weights, heads, backend=backend)
        if backend == "gpu" and 2 * rope[0].shape[1] == self.head_dim:
            joined = self._normed(qkv.reshape(qkv.shape[0], -1, self.head_dim))
            rotating = self.heads + self.kv_heads
            joined = rotate_leading(joined, rope, rotating)
            return joined[:, : self.heads], joined[:, self.heads : rotating], joined[:, rotating:]
        q, k, v = split(qkv, self.qkv_proj)
        q = q.reshape(-1, self.heads, self.head_dim)
        k = k.reshape(-1, self.kv_heads, self.head_dim)
        v = v.reshape(-1, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rope), rotate(k, rope), v

    def _normed(self, joined: jax.Array) -> jax.Array:
        """Queries and keys of [T, all heads, head_dim] normalized at once, where the family does that."""
        if self.q_norm is None or self.k_norm is None:
            return joined
        pairs = ((self.q_norm.weight, self.heads), (self.k_norm.weight, 2 * self.kv_heads))
        weight = jnp.concatenate([jnp.broadcast_to(w[...], (count, self.head_dim)) for w, count in pairs])
        normed = norms.rms_norm(joined, weight, eps=self.q_norm.eps, unit_offset=self.q_norm.unit_offset)
        head = jax.lax.broadcasted_iota(jnp.int32, joined.shape, 1)
        return jnp.where(head < self.heads + self.kv_heads, normed, joined)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)), gate and up fused."""

    def __init__(self, config: DecoderConfig, *, dtype):
        hidden, intermediate, shards = config.hidden_size, config.intermediate_size, config.tensor_shards
        self.gate_up_proj = Linear(
            hidden,
            {"gate_proj": intermediate, "up_proj": intermediate},
            dtype=dtype,
            axes=("embed", "mlp"),
            bias=config.mlp_bias,
            source="gate_up_proj" if config.fused_projections else None,
            shards=shards,
        )
        self.down_proj = Linear(
            intermediate, {"down_proj": hidden}, dtype=dtype, axes=("mlp", "embed"), bias=config.mlp_bias, shards=shards
        )
        self.activation = config.activation

    def __call__(self, x: jax.Array, metadata: StepMetadata) -> jax.Array:
        """[T, embed] to [T, intermediate], which `down_proj` has still to bring back."""
        return gated(x, self.gate_up_proj, self.activation, metadata)
