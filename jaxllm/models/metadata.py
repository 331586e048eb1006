"""What a step tells the model about its tokens, beside the tokens themselves."""

import dataclasses

import jax

from pallas_kernels.ragged_paged_attention import AttentionMetadata


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearMetadata:
    """What projections need to know of the rows.

    Attributes:
      adapter_ids: int32[T], the adapter slot of each token, or None while no adapters are loaded.
    """

    adapter_ids: jax.Array | None = None

    def take(self, rows: jax.Array) -> "LinearMetadata":
        """That of these tokens alone."""
        return LinearMetadata(None if self.adapter_ids is None else self.adapter_ids[rows])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetadata:
    """One step's metadata.

    Attributes:
      attention: an AttentionMetadata for each cache group of the model, in the model's order.
      linear: see LinearMetadata.
      output_rows: int32[R], the tokens whose hidden rows are wanted: what the last layer computes after its attention
        is for them alone. None: all.
      backend: the attention backend, one of pallas_kernels.ragged_paged_attention.BACKENDS (static).
      stream_axis: the mesh axis over whose shards the residual stream's rows are dealt out, None: each has all of them
        (static). A model is given the axis over which they may be.
      peers: int32[n + 1, 2], where the n shards' memory lies for sums into such a stream, see
        `pallas_kernels.all_reduce_rms_norm.open_memory`; None: they need none, or there is none.
    """

    attention: tuple[AttentionMetadata, ...]
    linear: LinearMetadata
    output_rows: jax.Array | None = None
    backend: str = dataclasses.field(default="reference", metadata=dict(static=True))
    stream_axis: str | None = dataclasses.field(default=None, metadata=dict(static=True))
    peers: jax.Array | None = None

    @property
    def positions(self) -> jax.Array:
        """int32[T], the same in every group."""
        return self.attention[0].positions
