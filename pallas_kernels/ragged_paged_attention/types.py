"""The values that every backend of ragged paged attention shares: the batch's metadata and the cache's spec."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step stand, for one group of layers that share a page table.

    T is the token rung (padded), S the number of rows (padded sequences), P the pages a row may hold. Real rows come
    first, and among them those of one query token come first, so that a kernel can split the batch in two.

    Attributes:
      positions: int32[T], the position of each token in its sequence; 0 for padding.
      row_ids: int32[T], the row of each token; padding tokens carry S - 1.
      query_starts: int32[S + 1], offsets of each row's tokens in T; padding rows are empty and stand at `num_tokens`.
      kv_lens: int32[S], keys that exist once this step's are written; 0 for padding rows. The query tokens of row r
        are the last `query_starts[r + 1] - query_starts[r]` of its `kv_lens[r]` positions.
      page_tables: int32[S, P], page numbers; entries past a row's last page, and those that left the window, are 0.
      write_slots: int32[T], `page * page_size + offset` where each token's key and value go; padding tokens point
        into page 0, the dummy page, which no row reads.
      num_rows: int32[], how many rows are real.
      num_decodes: int32[], how many leading rows have exactly one query token.
      decodes_only: static. True promises that every real row has exactly one query token: row r's token is token r,
        T equals S, and `num_decodes` equals `num_rows`. A backend may then leave out all that longer rows need.
    """

    positions: jax.Array
    row_ids: jax.Array
    query_starts: jax.Array
    kv_lens: jax.Array
    page_tables: jax.Array
    write_slots: jax.Array
    num_rows: jax.Array
    num_decodes: jax.Array
    decodes_only: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What one layer's cache holds. Each backend lays it out as it likes: `api.cache_shape(spec, backend)`.

    Page 0 is the dummy page: padding writes to it and nothing reads it.
    """

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
