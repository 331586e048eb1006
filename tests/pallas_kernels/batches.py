"""Builds paged batches the way the engine does, on the host, for tests of attention and of models."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import AttentionMetadata, CacheSpec, cache_shape


def metadata(
    starts: list[int],
    lengths: list[int],
    page_tables: np.ndarray,
    page_size: int,
    num_tokens: int,
    decodes_only: bool = False,
) -> AttentionMetadata:
    """Rows whose tokens `starts[r]`, …, `starts[r] + lengths[r] - 1` are computed now; those of one token stand first.

    Args:
      page_tables: int32[S, P]; rows past len(starts) are padding.
      num_tokens: the token rung T.
    """
    num_rows, total = len(starts), sum(lengths)
    padded_rows = page_tables.shape[0]
    assert total <= num_tokens and num_rows <= padded_rows
    is_one = [length == 1 for length in lengths]
    assert is_one == sorted(is_one, reverse=True), "rows of one token stand first"
    positions, row_ids = np.zeros(num_tokens, np.int32), np.full(num_tokens, padded_rows - 1, np.int32)
    write_slots = np.arange(num_tokens, dtype=np.int32) % page_size  # padding writes to page 0
    query_starts = np.full(padded_rows + 1, total, np.int32)
    kv_lens = np.zeros(padded_rows, np.int32)
    offset = 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        query_starts[row] = offset
        kv_lens[row] = start + length
        for index in range(length):
            position = start + index
            page = page_tables[row, position // page_size]
            positions[offset + index], row_ids[offset + index] = position, row
            write_slots[offset + index] = page * page_size + position % page_size
        offset += length
    return AttentionMetadata(
        positions=jnp.asarray(positions),
        row_ids=jnp.asarray(row_ids),
        query_starts=jnp.asarray(query_starts),
        kv_lens=jnp.asarray(kv_lens),
        page_tables=jnp.asarray(page_tables, jnp.int32),
        write_slots=jnp.asarray(write_slots),
        num_rows=jnp.int32(num_rows),
        num_decodes=jnp.int32(sum(is_one)),
        decodes_only=decodes_only,
    )


def shuffled_tables(
    rng: np.random.Generator, kv_lens: list[int], page_size: int, padded_rows: int, width: int, num_pages: int
) -> np.ndarray:
    """int32[padded_rows, width]: each row's pages, drawn without order from 1 to num_pages - 1."""
    tables = np.zeros((padded_rows, width), np.int32)
    free = rng.permutation(np.arange(1, num_pages))
    for row, length in enumerate(kv_lens):
        count = -(-length // page_size)
        tables[row, :count], free = free[:count], free[count:]
    return tables


def release(tables: np.ndarray, starts: list[int], page_size: int, window: int | None) -> np.ndarray:
    """The tables without the pages that have left the window of every query from `starts` on."""
    tables = tables.copy()
    for row, start in enumerate(starts if window is not None else []):
        tables[row, : max(start - window + 1, 0) // page_size] = 0
    return tables


def empty_cache(spec: CacheSpec, backend: str) -> np.ndarray:
    """A cache in which nothing has been written: NaN everywhere, the dummy page included."""
    shape = cache_shape(spec, backend)
    return np.full(shape.shape, np.nan, shape.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem. `rows` lists (query tokens, keys once they are written)."""

    rows: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    scales: bool = False
    padding: int = 3  # tokens and rows beyond the real ones
    decodes_only: bool = False
    width: int | None = None  # of the page tables; None: what the longest row needs and two more
    seed: int = 0

    def build(self):
        """q, keys and values of each row (float32 [keys, heads, dim]), new k and v, the cache with all history in it
        ([pages, 2, kv heads, page_size, dim], NaN elsewhere), the metadata, and the keyword arguments."""
        rng = np.random.default_rng(self.seed)
        lengths, kv_lens = [q for q, _ in self.rows], [kv for _, kv in self.rows]
        starts = [kv - q for q, kv in self.rows]
        num_tokens, padded_rows = sum(lengths) + self.padding, len(self.rows) + self.padding
        num_pages = 1 + sum(-(-kv // self.page_size) for kv in kv_lens) + 5
        width = self.width or max([-(-kv // self.page_size) for kv in kv_lens], default=0) + 2
        tables = shuffled_tables(rng, kv_lens, self.page_size, padded_rows, width, num_pages)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        q = normal(num_tokens, self.num_heads, self.head_dim)
        keys = [normal(kv, self.num_kv_heads, self.head_dim) for kv in kv_lens]
        values = [normal(kv, self.num_kv_heads, self.head_dim) for kv in kv_lens]
        k, v = (normal(num_tokens, self.num_kv_heads, self.head_dim) for _ in range(2))
        k[sum(lengths) :] = v[sum(lengths) :] = np.nan  # padding may hold anything
        q[sum(lengths) :] = np.nan
        scales = (1.5, 0.25) if self.scales else (1.0, 1.0)
        spec = CacheSpec(num_pages, self.page_size, self.num_kv_heads, self.head_dim, jnp.dtype(jnp.float32))
        cache = empty_cache(spec, "reference")
        released = release(tables, starts, self.page_size, self.window)
        offset = 0
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            k[offset : offset + length], v[offset : offset + length] = keys[row][start:], values[row][start:]
            offset += length
            for position in range(start):
                page, at = released[row, position // self.page_size], position % self.page_size
                if page:
                    cache[page, 0, :, at] = keys[row][position] / scales[0]
                    cache[page, 1, :, at] = values[row][position] / scales[1]
        options: dict = dict(scale=self.head_dim**-0.5, window=self.window, cap=self.cap)
        if self.sinks:
            options["sinks"] = jnp.asarray(rng.standard_normal(self.num_heads), jnp.float32)
        if self.scales:
            options |= {"k_scale": jnp.float32(scales[0]), "v_scale": jnp.float32(scales[1])}
        made = metadata(starts, lengths, released, self.page_size, num_tokens, self.decodes_only)
        return q, keys, values, k, v, cache, made, options


def dense(case: Case, q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], options: dict) -> np.ndarray:
    """The answer in float64, one query and one head at a time; zero for padding."""
    out = np.zeros(q.shape)
    group = case.num_heads // case.num_kv_heads
    token = 0
    for row, (length, kv) in enumerate(case.rows):
        for position in range(kv - length, kv):
            first = 0 if case.window is None else max(position - case.window + 1, 0)
            for head in range(case.num_heads):
                key, value = (
                    side[row][first : position + 1, head // group].astype(np.float64) for side in (keys, values)
                )
                scores = key @ q[token, head].astype(np.float64) * options["scale"]
                if case.cap is not None:
                    scores = case.cap * np.tanh(scores / case.cap)
                if case.sinks:
                    scores = np.append(scores, float(options["sinks"][head]))
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[token, head] = weights[: len(value)] @ value
            token += 1
    return out
