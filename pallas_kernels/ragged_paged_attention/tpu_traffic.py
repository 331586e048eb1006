"""What the TPU kernels move of the paged cache and what they multiply, for a batch of known lengths, on one shard.

The same arithmetic as in the kernels' bodies, for accounting: a compiler sees a kernel as a call that takes the whole
cache. Queries, new keys and values, outputs and tables are not in it where they are plain operands, each moved once.
Decode takes what its rows need of them, which `decode_operands` says.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from . import tpu_sizes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kernel in one layer.

    Attributes:
      read, written: bytes from and to the cache; read also has what `tpu_write` reads of new keys and values beyond
        once.
      flops: of products of queries with their own head's keys and values, with all that is masked in them.
      filler_flops: of products of queries with other heads' keys, all masked: they run where registers would otherwise
        lie empty, see `tpu_decode`.
    """

    read: int = 0
    written: int = 0
    flops: int = 0
    filler_flops: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
            self.filler_flops + other.filler_flops,
        )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def decode(
    problem: tpu_sizes.Problem,
    sizes: tpu_sizes.DecodeSizes,
    kv_lens: Sequence[int],
    window: int | None = None,
) -> Traffic:
    """`tpu_decode` over rows of one query token that see `kv_lens` keys, their own included."""
    token = problem.num_kv_heads * problem.cache_lanes * problem.cache_bytes
    heads = problem.num_kv_heads // sizes.parts
    bundle = tpu_sizes.bundle_heads(heads, problem.group)
    page, tile = problem.page_size, problem.copied_tile
    total = Traffic()
    for kv_len in kv_lens:
        first = 0 if window is None else max(kv_len - window, 0) // page
        pages = cdiv(kv_len, page) - first
        blocks = cdiv(pages, sizes.keys // page)
        own = 4 * blocks * sizes.keys * problem.num_kv_heads * problem.group * problem.key_lanes
        read = cdiv(kv_len - 1 - first * page, tile) * tile * token
        total += Traffic(read, problem.word_tokens * token, own, (bundle - 1) * own)
    return total


def decode_operands(problem: tpu_sizes.Problem, num_decodes: int) -> int:
    """Bytes of queries, new keys and values that `tpu_decode` reads: whole tiles of tokens, one at least."""
    tokens = max(32 // problem.q_bytes, problem.tile)
    queries = problem.num_kv_heads * problem.group * problem.key_lanes * problem.q_bytes
    new = problem.num_kv_heads * problem.cache_lanes * problem.cache_bytes
    return max(cdiv(num_decodes, tokens), 1) * tokens * (queries + new)


def write(problem: tpu_sizes.Problem, lengths: Sequence[int], kv_lens: Sequence[int], num_before: int = 0) -> Traffic:
    """`tpu_write` of rows of several tokens: the last `lengths` of `kv_lens`; the first row's first token is the step's
    token `num_before`."""
    size, tile = tpu_sizes.run_tokens(problem.page_size), problem.copied_tile
    fetched = old = written = 0
    start = num_before
    for length, end in zip(lengths, kv_lens, strict=True):
        first = end - length
        for base in range(first // size * size, end, size):
            low, high = max(base, first), min(base + size, end)
            fetched += _tiles(start + low - first, start + high - first, tile)
            written += _tiles(low, high, tile)
        old += first % tile > 0
        start += length
    token = problem.num_kv_heads * problem.cache_lanes * problem.cache_bytes
    return Traffic(((fetched + old) * tile - sum(lengths)) * token, written * tile * token)


def _tiles(low: int, high: int, tile: int) -> int:
    """That tokens [low, high) lie in."""
    return cdiv(high, tile) - low // tile


def prefill(
    problem: tpu_sizes.Problem,
    sizes: tpu_sizes.PrefillSizes,
    num_before: int,
    lengths: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None = None,
) -> Traffic:
    """`tpu_prefill` of the last `lengths` tokens of rows that see `kv_lens` keys; the first row's first token is the
    step's token `num_before`."""
    token = problem.num_kv_heads * problem.cache_lanes * problem.cache_bytes
    page, keys, tile = problem.page_size, sizes.keys, problem.copied_tile
    total = Traffic()
    for low, high, origin in _segments(sizes.tokens, num_before, lengths, kv_lens):
        first = 0 if window is None else max(origin + low - window + 1, 0) // page
        seen = origin + high - first * page
        products = sum(
            _products(problem, sizes, low, high, origin, block * keys + first * page, window)
            for block in range(cdiv(seen, keys))
        )
        flops = 4 * problem.num_kv_heads * problem.group * problem.key_lanes * products
        total += Traffic(cdiv(seen, tile) * tile * token, 0, flops)
    return total


def _segments(block: int, start: int, lengths: Sequence[int], kv_lens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of each row's part of each block of query tokens: the tokens [low, high) in the block, and the position of the
    block's token 0."""
    for length, kv_len in zip(lengths, kv_lens, strict=True):
        end = start + length
        for base in range(start // block * block, end, block):
            yield max(start - base, 0), min(end - base, block), kv_len - (end - base)
        start = end


def _products(
    problem: tpu_sizes.Problem,
    sizes: tpu_sizes.PrefillSizes,
    low: int,
    high: int,
    origin: int,
    first_key: int,
    window: int | None,
) -> int:
    """Query tokens times keys that meet of the block of keys from `first_key` on: whole chunks with all of it, or some
    parts of a chunk with as much as they see, rounded up to a span."""
    chunk, keys = sizes.chunk, sizes.keys
    part, spans = tpu_sizes.part_tokens(chunk, problem.group), tpu_sizes.spans(keys)
    from_token = max(low, first_key - origin)
    to_token = high if window is None else min(high, first_key + keys - 1 + window - origin)
    total = 0
    for base in range(from_token // chunk * chunk, to_token, chunk):
        all_seen = low <= base and high >= base + chunk and first_key + keys <= origin + base + 1
        if window is not None:
            all_seen = all_seen and first_key >= origin + base + chunk - window
        parts = range(max(from_token - base, 0) // part, cdiv(min(to_token - base, chunk), part))
        seen = [min(base + end, high) + origin - first_key for end in (*((at + 1) * part for at in parts), chunk)]
        few = (part < chunk and 2 * len(parts) * part <= chunk) or (len(spans) > 1 and 2 * seen[-1] <= keys)
        if all_seen or not few:
            total += chunk * keys
        else:
            total += sum(part * next(span for span in spans if span >= min(each, keys)) for each in seen[:-1])
    return total


def of_step(
    chip: str,
    problem: tpu_sizes.Problem,
    lengths: Sequence[int],
    kv_lens: Sequence[int],
    *,
    decodes_only: bool,
    window: int | None = None,
) -> dict[str, Traffic]:
    """Each kernel's traffic in a step, by its name.

    Args:
      chip: a name in tpu_tuned.json.
      lengths: query tokens of each row; rows of one stand first and are served by `tpu_decode`.
      kv_lens: keys that each row sees, its new ones included.
    """
    device = tpu_sizes.chip_of(chip)
    num_decodes = next((row for row, length in enumerate(lengths) if length > 1), len(lengths))
    found = {
        "ragged_paged_decode": decode(problem, tpu_sizes.decode_sizes(device, problem), kv_lens[:num_decodes], window)
    }
    if not decodes_only:
        longer, their_keys = lengths[num_decodes:], kv_lens[num_decodes:]
        found["ragged_paged_write"] = write(problem, longer, their_keys, num_decodes)
        found["ragged_paged_prefill"] = prefill(
            problem, tpu_sizes.prefill_sizes(device, problem), num_decodes, longer, their_keys, window
        )
    return found
