"""Checks the Hopper kernels against the float32 reference on fresh random batches, then times them.

    python -m pallas_kernels.ragged_paged_attention.stress_gpu [check] [decode] [prefill] [--seconds N] [--processes N]
        [--page-size N]

The kinds of batch to check (`KINDS`) are dealt to several processes: a compilation is mostly Python. Unused
and foreign pages, the tails of last pages and the dummy page hold NaN. Timings are of the whole operation, the write
included, over 32 layer caches in turn, so that the second-level cache cannot flatter, and stand beside the machine's
own copy and matrix-product rates. They are wall time: the pauses between calls of 32 layers count in.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from . import gpu, reference
from .types import AttentionMetadata

LAYERS = 32
SHAPES = ((32, 8, 128), (28, 4, 128), (8, 8, 64), (16, 1, 64), (8, 4, 256), (64, 8, 64), (32, 32, 96))
# Decode splits the last two, of 64 and 71 heads, 71 with a head of zeros.
LARGE_GROUPS = ((17, 1, 128), (48, 1, 256), (64, 1, 128), (142, 2, 64))
FEATURES = ((), ("window",), ("cap",), ("sinks",), ("window", "cap", "sinks", "scales"))
SIZES = {"decodes": (33, 33), "mixed": (160, 17), "few decodes": (6, 6)}  # tokens and rows, padding included
# (query heads, key-value heads, head_dim), a name of SIZES, what attention has besides. Few decodes prefetch a weight.
KINDS = (
    *itertools.product(SHAPES, ("decodes", "mixed"), FEATURES),
    *itertools.product(SHAPES, ("few decodes",), (FEATURES[0], FEATURES[-1])),
    *itertools.product(LARGE_GROUPS, ("decodes", "mixed"), (FEATURES[0], FEATURES[-1])),
)


def make_metadata(
    rng, rows, *, page_size, num_pages, tokens, max_rows, table_width=None, decodes_only=False, prefixes=None
) -> AttentionMetadata:
    """Metadata of `rows`, a list of (query tokens, keys), one-token rows first, over pages drawn at random.

    `prefixes` has for each row (name, pages): rows of one name share their first pages.
    """
    rows = sorted(rows, key=lambda row: row[0] != 1)
    widths = [-(-keys // page_size) for _, keys in rows]
    table_width = table_width or max(widths, default=1)
    free = iter(1 + rng.permutation(num_pages - 1))
    tables = np.zeros((max_rows, table_width), np.int32)
    kv_lens = np.zeros(max_rows, np.int32)
    positions, slots = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    row_ids = np.full(tokens, max_rows - 1, np.int32)
    starts = np.zeros(max_rows + 1, np.int32)
    at = 0
    for row, (queries, keys) in enumerate(rows):
        pages = 0
        if prefixes is not None and prefixes[row][0] in {name for name, _ in prefixes[:row]}:
            name, pages = prefixes[row]
            tables[row, :pages] = tables[[other for other, _ in prefixes].index(name), :pages]
        tables[row, pages : widths[row]] = [next(free) for _ in range(widths[row] - pages)]
        kv_lens[row] = keys
        here = np.arange(keys - queries, keys)
        positions[at : at + queries] = here
        row_ids[at : at + queries] = row
        slots[at : at + queries] = tables[row, here // page_size] * page_size + here % page_size
        at += queries
        starts[row + 1] = at
    starts[len(rows) + 1 :] = at
    decodes = sum(queries == 1 for queries, _ in rows)
    arrays = (positions, row_ids, starts, kv_lens, tables, slots, np.int32(len(rows)), np.int32(decodes))
    names = [field.name for field in dataclasses.fields(AttentionMetadata)]
    return AttentionMetadata(
        **{name: jnp.asarray(value) for name, value in zip(names, arrays)}, decodes_only=decodes_only
    )


def pages_of(rows, page_size) -> int:
    """The dummy page, those of the rows, and two of nobody's."""
    return sum(-(-keys // page_size) for _, keys in rows) + 3


def make_case(
    seed, rows, *, heads, kv_heads, head_dim, page_size, tokens=None, max_rows=None, table_width=None, window=None,
    decodes_only=False, prefixes=None, num_pages=None,
):  # fmt: skip
    """(q, k, v, cache, metadata) in bfloat16 with NaN in everything that no query may see."""
    rng = np.random.default_rng(seed)
    tokens = tokens or max(1, sum(queries for queries, _ in rows))
    max_rows = max_rows or (tokens if decodes_only else len(rows) + 1)
    num_pages = num_pages or pages_of(rows, page_size)
    metadata = make_metadata(
        rng, rows, page_size=page_size, num_pages=num_pages, tokens=tokens, max_rows=max_rows,
        table_width=table_width, decodes_only=decodes_only, prefixes=prefixes,
    )  # fmt: skip
    cache = np.full((num_pages, 2, kv_heads, page_size, head_dim), np.nan, np.float32)
    tables = np.array(metadata.page_tables)
    starts = np.asarray(metadata.query_starts)
    for row, keys in enumerate(np.asarray(metadata.kv_lens)):
        first_query = keys - (starts[row + 1] - starts[row])
        oldest = 0 if window is None else max(0, first_query - window + 1)
        for number in range(-(-int(keys) // page_size)):
            if (number + 1) * page_size <= oldest:
                tables[row, number] = 0  # left the window
                continue
            used = min(page_size, int(keys) - number * page_size)
            content = rng.standard_normal((2, kv_heads, used, head_dim))
            cache[tables[row, number], :, :, :used] = content
    metadata = dataclasses.replace(metadata, page_tables=jnp.asarray(tables))
    q = rng.standard_normal((tokens, heads, head_dim))
    k, v = rng.standard_normal((2, tokens, kv_heads, head_dim))
    q[starts[-1] :] = k[starts[-1] :] = v[starts[-1] :] = np.nan
    return *(jnp.asarray(x.astype(jnp.bfloat16)) for x in (q, k, v, cache)), metadata


def relative_error(out, expected) -> float:
    """Norm of the difference over the norm; NaN where either holds one."""
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(out - expected) / (norm if norm else 1.0))


def random_rows(rng, num_rows, longest, longest_query):
    rows = []
    for _ in range(num_rows):
        queries = int(rng.integers(1, longest_query + 1)) if rng.random() < 0.4 else 1
        rows.append((queries, queries + int(rng.integers(0, longest))))
    return rows


def check(seconds: float, first: int = 0, step: int = 1):
    """Random batches of every `step`-th kind from `first` on, each once at least, until the time is up."""
    rng = np.random.default_rng(time.time_ns())
    end, worst, count, wrong = time.time() + seconds, 0.0, first, 0
    while time.time() < end or count < len(KINDS):
        (heads, kv_heads, head_dim), size, features = KINDS[count % len(KINDS)]
        (tokens, max_rows), decodes_only = SIZES[size], size != "mixed"
        page_size = int(rng.choice([16, 32, 64, 128]))
        window = int(rng.integers(1, 500)) if "window" in features else None
        options = {"scale": head_dim**-0.5, "window": window, "cap": 20.0 if "cap" in features else None}
        if "sinks" in features:
            options["sinks"] = jnp.asarray(rng.uniform(2, 5, heads), jnp.float32)  # one that is counted twice shows
        if "scales" in features:  # powers of two, by which both paths divide alike
            options |= {"k_scale": jnp.float32(0.5), "v_scale": jnp.float32(4.0)}
        then = jnp.zeros((heads * head_dim, 16384), jnp.bfloat16) if size == "few decodes" else None
        run = jax.jit(functools.partial(gpu.ragged_paged_attention, then=then, **options))
        truth = jax.jit(functools.partial(reference.ragged_paged_attention, **options))
        batches = []
        for _ in range(4):
            rows, prefixes = random_rows(rng, int(rng.integers(1, max_rows)), 700, 1 if decodes_only else 100), None
            while sum(queries for queries, _ in rows) > tokens:
                rows.pop()
            if rng.random() < 0.5:
                rows.sort(key=lambda row: row[0] != 1)
                shared = [int(name) for name in rng.integers(0, 4, len(rows))]  # three prefixes, and none
                prefixes = [(name, 256 // page_size * name) for name in shared]
                rows = [(queries, keys + 256 * name) for name, (queries, keys) in zip(shared, rows)]
            batches.append((rows, prefixes))
        num_pages = max(pages_of(rows, page_size) for rows, _ in batches)  # one shape, one compilation
        for rows, prefixes in batches:
            args = make_case(
                int(rng.integers(1 << 31)), rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                page_size=page_size, tokens=tokens, max_rows=max_rows, table_width=-(-1568 // page_size),
                window=window, decodes_only=decodes_only, prefixes=prefixes, num_pages=num_pages,
            )  # fmt: skip
            expected, expected_cache = truth(*args)
            lanes = gpu.padded_head_dim(head_dim) - head_dim
            args = (*args[:3], jnp.pad(args[3], ((0, 0),) * 4 + ((0, lanes),)), args[4])
            once, cache = run(*args)
            cache = cache[..., :head_dim]
            same = True
            for _ in range(3):
                again, _ = run(*args)
                same &= bool((again == once).all())
            error = relative_error(once, expected)
            written = bool(
                ((cache == expected_cache) | (cache != cache) & (expected_cache != expected_cache))[1:].all()
            )
            worst = max(worst, error)
            if not (error < 1e-2 and same and written):
                wrong += 1
                print(
                    f"WRONG {error=:.2e} {same=} {written=} {heads=} {kv_heads=} {head_dim=} {page_size=} {options=} "
                    f"{size=} {rows=} {prefixes=}"
                )
        count += step
    kinds = (count - first) // step
    print(f"checked {kinds} kinds of batch, 4 each; worst relative error {worst:.2e}; {wrong} wrong", flush=True)
    if wrong:
        raise SystemExit(1)


def check_in_processes(seconds: float, processes: int):
    """`check`, its kinds dealt to so many processes that share the device. Raises SystemExit when one was wrong."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", __spec__.name, "check", "--seconds", str(seconds)]
    running = [
        subprocess.Popen([*command, "--first", str(first), "--step", str(processes)], env=environment)
        for first in range(processes)
    ]
    if any([process.wait() for process in running]):
        raise SystemExit(1)


def seconds_a_call(run, *args, repeats=5) -> float:
    """Best of three of the time of one call among `repeats` in a row, so that the host runs ahead of the device."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / repeats)
    return min(times)


def ceilings():
    source = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x * jnp.bfloat16(1.0078125))
    rate = 4 * source.size / seconds_a_call(copy, source, repeats=20)
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in (1, 2))
    flops = 2 * 8192**3 / seconds_a_call(jax.jit(jnp.matmul), a, b, repeats=20)
    print(f"copy {rate / 1e12:.2f} TB/s, 8192 matrix product {flops / 1e12:.0f} TFLOP/s", flush=True)


def make_caches(num_pages, page_size, kv_heads=8, head_dim=128):
    shape = (num_pages, 2, kv_heads, page_size, head_dim)
    fill = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))
    return [fill(i) for i in range(LAYERS)]


DECODES = {
    "64 x 2048": [2048] * 64,
    "8 x 8192": [8192] * 8,
    "256 x 384 ragged": [int(n) for n in np.random.default_rng(0).integers(128, 641, 256)],
    "256 x 160 after 2048 shared": [2208] * 256,
    "1 x 8192": [8192],
    "1 x 512": [512],
}
PREFILLS = {"1 x 8192": [(8192, 8192)], "4 x 2048": [(2048, 2048)] * 4, "2048 over 14k": [(2048, 16384)]}


def layers_of(one_layer):
    """A jitted (q, k, v, caches, metadata) -> (q, caches): `one_layer` over every cache, which is donated."""

    def run(q, k, v, caches, metadata):
        outs = []
        for cache in caches:
            q, cache = one_layer(q, k, v, cache, metadata)
            outs.append(cache)
        return q, outs

    return jax.jit(run, donate_argnums=3)


def time_layers(one_layer, q, kv, caches, metadata) -> tuple[float, list]:
    """(seconds a layer, the caches)"""
    run = layers_of(jax.jit(one_layer))
    q, caches = run(q, *kv, caches, metadata)
    times = []
    for _ in range(3):
        jax.block_until_ready((q, caches))
        start = time.perf_counter()
        for _ in range(4):
            q, caches = run(q, *kv, caches, metadata)
        jax.block_until_ready(q)
        times.append((time.perf_counter() - start) / 4 / LAYERS)
    return min(times), caches


def time_cases(kind, page_size, one_layer, label, names=None, heads=32, kv_heads=8, head_dim=128, caches=None):
    """Prints what `one_layer`, a (q, k, v, cache, metadata) -> (q, cache), reaches on the named cases."""
    rng = np.random.default_rng(0)
    if caches is None:
        caches = make_caches(131072 // page_size + 300, page_size, kv_heads, head_dim)
    for name in names or (DECODES if kind == "decode" else PREFILLS):
        prefixes = None
        if kind == "decode":
            rows = [(1, n) for n in DECODES[name]]
            if "shared" in name:
                prefixes = [("all", 2048 // page_size)] * len(rows)
            work, unit = 4 * kv_heads * head_dim * sum(DECODES[name]), "TB/s"
        else:
            rows = PREFILLS[name]
            pairs = sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in rows)
            work, unit = 4 * heads * head_dim * pairs, "TFLOP/s"
        tokens = sum(queries for queries, _ in rows)
        metadata = make_metadata(
            rng, rows, page_size=page_size, num_pages=caches[0].shape[0], tokens=tokens, max_rows=len(rows),
            table_width=16384 // page_size, decodes_only=kind == "decode", prefixes=prefixes,
        )  # fmt: skip
        q = jax.random.normal(jax.random.key(1), (tokens, heads, head_dim), jnp.bfloat16)
        kv = jax.random.normal(jax.random.key(2), (2, tokens, kv_heads, head_dim), jnp.bfloat16)
        took, caches = time_layers(one_layer, q, kv, caches, metadata)
        print(f"{kind} {name}, {label}: {took * 1e6:.1f} us, {work / took / 1e12:.2f} {unit}", flush=True)
    return caches


def whole_layer(**options):
    return lambda q, k, v, cache, metadata: gpu.ragged_paged_attention(
        q, k, v, cache, metadata, scale=q.shape[2] ** -0.5, **options
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["check", "decode", "prefill"])
    parser.add_argument("--seconds", type=float, default=60, help="how long to check")
    parser.add_argument("--processes", type=int, default=1, help="that check beside each other")
    parser.add_argument("--first", type=int, help="check in this process alone, from this kind on")
    parser.add_argument("--step", type=int, default=1, help="with --first: every so many-th kind")
    parser.add_argument("--page-size", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.first is not None:
        return check(arguments.seconds, arguments.first, arguments.step)
    if "check" in arguments.what:  # before this process takes the device's memory
        check_in_processes(arguments.seconds, arguments.processes)
    ceilings()
    caches = None
    for kind in ("decode", "prefill"):
        if kind in arguments.what:
            label = f"pages of {arguments.page_size}"
            caches = time_cases(kind, arguments.page_size, whole_layer(), label, caches=caches)


if __name__ == "__main__":
    main()
