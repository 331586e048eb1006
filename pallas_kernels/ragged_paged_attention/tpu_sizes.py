"""Block sizes of the TPU kernels: one row of tpu_tuned.json a chip, cut down to a problem's shape and to VMEM.

The rows are reasoned, not timed:
  decode: a block of keys and values is about a megabyte, so that its copy takes longer than what is computed on it and
    than a copy's latency, and the ring holds enough of them to cover that latency where rows are short. tpu7x, with
    3.7 TB/s a core, needs two megabytes for the first.
  prefill: a key-value head's tile of group * tokens query rows does about that many operations a byte read. 512 is
    beyond 240 (v5e), 187 (v5p) and 223 (v4), the chips' operations a byte of HBM; 1024 is beyond 561 (v6e) and 312
    (tpu7x), whose MXU is also 256 wide.
  cores: v4 and v5p show two TensorCores as one device. They split the key-value heads, the first axis of each grid.
  projects_heads: where what a projection makes does not stay on the chip (v5p, tpu7x). Elsewhere it does, and the
    kernel gains nothing: with its rows, which XLA's product normalizes as it reads them, Llama 3.1 8B moved 7% more.
  vmem_limit_bytes: of 16 MiB a core (v4), 128 (v5e, v6e) and 64 (v5p, tpu7x); the rest is left to XLA.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax

LANES = 128
SUBLANES = 8
TABLE_BYTES = 512 * 1024  # of the 1 MiB of SMEM, for page tables
MOST_PREFILL_BYTES = 24_000_000  # of VMEM
LEAST_LIMIT = 8_000_000  # of VMEM
MOST_KEYS = 512  # a block of keys; more would only waste the tail of a row
MOST_RUN = 64  # tokens of a page that are written at once
RUN_SLOTS = 4  # such runs in VMEM
RUN_AHEAD = 2  # of them on their way to it
PART_ROWS = 128  # query rows, and at least PART_TOKENS tokens, of the parts of a block that a short row is cut to
PART_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels are sized for.

    Attributes:
      device_kinds: `jax.Device.device_kind` of such chips.
      cores: TensorCores that one device shows as one.
      vmem_limit_bytes: what a kernel may take on each.
      decode_block_bytes: keys and values of one block in decode, over all its heads.
      decode_buffers: such blocks in VMEM at once.
      prefill_rows: query rows (tokens times heads of a group) that meet a block of keys together.
      prefill_keys: keys in such a block.
      projects_heads: whether projections are rotated in the kernel that makes them (`qkv_projection`).
    """

    device_kinds: tuple[str, ...]
    cores: int
    vmem_limit_bytes: int
    decode_block_bytes: int
    decode_buffers: int
    prefill_rows: int
    prefill_keys: int
    projects_heads: bool

    @property
    def keeps_results(self) -> bool:
        """Whether XLA leaves results of products on the chip if they fit (see `jaxllm/plan/activations.py`). Two cores
        with a VMEM each exchange them through HBM; but v4's share CMEM."""
        return self.cores == 1 or not self.projects_heads

    @property
    def stay_bytes(self) -> int:
        """The most that an array may take up in VMEM on its way from or to a kernel. Where two cores are one device,
        none: each has a VMEM of its own, in which XLA keeps copies of an array, but a kernel that is split between them
        writes only its part into either. (v4 keeps arrays in CMEM, which both see.)"""
        return self.vmem_limit_bytes // 3 if self.cores == 1 else 0


@dataclasses.dataclass(frozen=True)
class DecodeSizes:
    """Rows a grid step, keys a block, blocks in VMEM, and the parts that the key-value heads are split into."""

    rows: int
    keys: int
    buffers: int
    parts: int


@dataclasses.dataclass(frozen=True)
class PrefillSizes:
    """Tokens and keys a block, the parts that the key-value heads are split into, and the tokens of a block that meet
    keys in one product."""

    tokens: int
    keys: int
    parts: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """What sizes depend on.

    Attributes:
      num_tokens, num_kv_heads, group, page_size, table_width: T, K, query heads a key-value head, tokens a page, P.
      key_lanes: lanes of a query and of a key, 128 or 256.
      cache_lanes: lanes of a key with its value, 128, 256 or 512.
      q_bytes, cache_bytes: of one element.
    """

    num_tokens: int
    num_kv_heads: int
    group: int
    page_size: int
    table_width: int
    key_lanes: int
    cache_lanes: int
    q_bytes: int
    cache_bytes: int

    @property
    def tile(self) -> int:
        """Tokens of the cache that fill registers: what is loaded and stored at once, where it need not be more."""
        return 32 // self.cache_bytes

    @property
    def copied_tile(self) -> int:
        """Tokens of the cache that are copied at least, but for those that decode writes."""
        return copied_tile(self.cache_bytes)

    @property
    def word_tokens(self) -> int:
        """Tokens of the cache that decode writes for one."""
        return word_tokens(self.cache_bytes)

    @property
    def capacity(self) -> int:
        """Keys that a page table holds, rounded up to a power of two."""
        return ceil_pow2(self.table_width * self.page_size)


def ceil_pow2(n: int) -> int:
    """The least power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()


def floor_pow2(n: int) -> int:
    """The greatest power of two that is at most n; 1 for n < 1."""
    return 1 << (max(n, 1).bit_length() - 1)


def copied_tile(itemsize: int) -> int:
    """Tokens of a tile of the cache in HBM, in which it is contiguous: what copies are made of. XLA lays it out in
    tiles of 8 tokens in float32 and bfloat16, of 32 in 8 bits, on all chips."""
    return {4: 8, 2: 8, 1: 32}[itemsize]


def word_tokens(itemsize: int) -> int:
    """Tokens whose elements share words of 32 bits: the least that a copy can move of a tile. Of 128 lanes they are 512
    bytes in one piece, in HBM and in VMEM."""
    return 4 // itemsize


@functools.cache
def chips() -> dict[str, Chip]:
    """tpu_tuned.json."""
    table = json.loads((Path(__file__).parent / "tpu_tuned.json").read_text())
    return {name: Chip(**{**row, "device_kinds": tuple(row["device_kinds"])}) for name, row in table.items()}


def supports(device_kind: str) -> bool:
    """Whether the kernels run on chips of this `jax.Device.device_kind`."""
    return any(device_kind in chip.device_kinds for chip in chips().values())


def chip_of(name: str | None) -> Chip:
    """The named chip; with None that of the abstract mesh which the trace runs under, and v4, whose sizes fit every
    chip, where there is no mesh.

    Raises:
      ValueError: a chip that is not in tpu_tuned.json.
    """
    if name is not None:
        if name not in chips():
            raise ValueError(f"chip {name!r} is unknown; the chips are {', '.join(chips())}")
        return chips()[name]
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = getattr(device, "device_kind", "")
    if not kind.startswith("TPU"):
        return chips()["v4"]
    for chip in chips().values():
        if kind in chip.device_kinds:
            return chip
    known = ", ".join(kind for chip in chips().values() for kind in chip.device_kinds)
    raise ValueError(f"device kind {kind!r} has no sizes in tpu_tuned.json; there are {known}")


def decode_sizes(chip: Chip, problem: Problem) -> DecodeSizes:
    """Raises ValueError for page tables that SMEM cannot hold."""
    parts = chip.cores if problem.num_kv_heads % chip.cores == 0 else 1
    heads = problem.num_kv_heads // parts
    keys = floor_pow2(chip.decode_block_bytes // (heads * problem.cache_lanes * problem.cache_bytes))
    keys = max(min(keys, MOST_KEYS, problem.capacity), problem.page_size)
    # The tables of this grid step's rows and of the next one's, twice each for Pallas' own pipeline.
    rows = min(8, floor_pow2(TABLE_BYTES // (4 * 4 * problem.table_width)))
    if problem.table_width > TABLE_BYTES // 16:
        raise ValueError(
            f"page tables of {problem.table_width} pages a row are not supported on TPU; the most is "
            f"{TABLE_BYTES // 16}: choose larger pages or a smaller max_model_len"
        )
    buffers = min(chip.decode_buffers, rows + 1)
    sizes = DecodeSizes(rows, keys, buffers, parts)
    while decode_vmem(problem, sizes) > chip.vmem_limit_bytes and sizes.buffers > 2:
        sizes = dataclasses.replace(sizes, buffers=sizes.buffers - 1)
    while decode_vmem(problem, sizes) > chip.vmem_limit_bytes and sizes.keys > problem.page_size:
        sizes = dataclasses.replace(sizes, keys=sizes.keys // 2)
    return sizes


def bundle_heads(heads: int, group: int) -> int:
    """Key-value heads that decode takes together: the fewest whose query heads fill registers of 8, or all."""
    return next((n for n in range(1, heads + 1) if heads % n == 0 and n * group % SUBLANES == 0), heads)


def decode_vmem(problem: Problem, sizes: DecodeSizes) -> int:
    """Bytes that the decode kernel keeps, its float32 scores (some at a time) included."""
    heads = problem.num_kv_heads // sizes.parts
    q_heads = -(-heads * problem.group // 8) * 8
    block = heads * sizes.keys * problem.cache_lanes * problem.cache_bytes
    bundle = bundle_heads(heads, problem.group)
    scores = 4 * q_heads * bundle * sizes.keys * 4
    tokens = max(32 // problem.q_bytes, problem.tile)
    queries, new = q_heads * problem.key_lanes, heads * problem.cache_lanes
    rows = 2 * (2 * queries * problem.q_bytes + new * problem.cache_bytes) + 4 * (2 * queries + new)
    return sizes.buffers * block + block + scores + tokens * rows


def run_tokens(page_size: int) -> int:
    """Tokens of a page that the write kernel takes at once."""
    return min(page_size, MOST_RUN)


def write_vmem(num_kv_heads: int, tokens: int, tile: int, cache_lanes: int, cache_bytes: int) -> int:
    """Bytes that the write kernel keeps for runs of `tokens`, what it shifts in float32 included."""
    slot = num_kv_heads * (2 * tokens + tile) * cache_lanes * cache_bytes
    return RUN_SLOTS * slot + 4 * (tokens + tile) * cache_lanes * 4


def vmem_limit(chip: Chip, needed: int) -> int:
    """What a kernel that keeps about `needed` bytes may take. All of that XLA keeps free, however little the kernel
    then uses; the rest it fills with weights on their way, and with arrays that the kernels behind take."""
    return min(chip.vmem_limit_bytes, max(LEAST_LIMIT, needed + needed // 8))


def prefill_sizes(chip: Chip, problem: Problem) -> PrefillSizes:
    """All tokens of the step in one block, or as many as VMEM has room for, so that keys and values are read once; then
    as many heads at once as it holds, since their pages come in one copy."""
    tile = max(16, problem.tile)
    chunk = max(tile, min(floor_pow2(chip.prefill_rows // problem.group), ceil_pow2(problem.num_tokens)))
    keys = max(min(chip.prefill_keys, problem.capacity), problem.page_size)
    parts = [part for part in range(1, problem.num_kv_heads + 1) if problem.num_kv_heads % part == 0]
    if problem.num_kv_heads % chip.cores == 0:
        parts = [part for part in parts if part % chip.cores == 0]
    tokens = max(chunk, ceil_pow2(problem.num_tokens))
    while tokens > chunk and prefill_vmem(problem, PrefillSizes(tokens, keys, parts[-1], chunk)) > _prefill_room(chip):
        tokens //= 2
    while True:
        for part in parts:
            sizes = PrefillSizes(tokens, keys, part, chunk)
            if prefill_vmem(problem, sizes) <= _prefill_room(chip):
                return sizes
        if prefill_vmem(problem, sizes) <= chip.vmem_limit_bytes:
            return sizes
        if chunk * problem.group > keys and chunk > tile:
            chunk //= 2
        elif keys > max(problem.page_size, LANES):
            keys //= 2
        elif chunk > tile:
            chunk //= 2
        else:
            return sizes
        tokens = chunk


def part_tokens(chunk: int, group: int) -> int:
    """Tokens of the parts that a chunk of the prefill kernel is cut to where few of its queries or keys count."""
    return min(chunk, max(PART_TOKENS, floor_pow2(PART_ROWS // group)))


def spans(keys: int) -> tuple[int, ...]:
    """The numbers of keys of a block that the prefill kernel can multiply, ascending up to all of them."""
    return tuple(keys >> shift for shift in reversed(range(keys.bit_length())) if keys >> shift >= LANES) or (keys,)


def _prefill_room(chip: Chip) -> int:
    """Bytes of VMEM that larger blocks may fill. The rest is better used by XLA for what stands around the kernel."""
    return min(chip.vmem_limit_bytes, MOST_PREFILL_BYTES)


def prefill_vmem(problem: Problem, sizes: PrefillSizes, *, stay_bytes: int = 0) -> int:
    """Bytes that the prefill kernel keeps, one product's float32 scores (three at a time) included; without queries and
    outputs that stay in VMEM around it, of which it needs no copies."""
    heads, rows = problem.num_kv_heads // sizes.parts, problem.group * sizes.tokens
    blocks = 2 * heads * sizes.keys * problem.cache_lanes * problem.cache_bytes
    q_and_out = 2 * 2 * heads * rows * problem.key_lanes * problem.q_bytes
    whole = -(-problem.num_tokens // sizes.tokens) * problem.num_kv_heads * rows * problem.key_lanes * problem.q_bytes
    if whole <= stay_bytes:
        q_and_out = 0
    state = heads * rows * (2 * LANES + problem.key_lanes) * 4
    return blocks + q_and_out + state + 4 * problem.group * sizes.chunk * sizes.keys * 4
