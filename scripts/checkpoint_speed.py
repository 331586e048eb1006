#!/usr/bin/env python
"""How fast a model's weights load, from safetensors and from what `jaxllm convert` made of them, beside the disk:

    jaxllm convert MODEL CONVERTED
    scripts/checkpoint_speed.py MODEL CONVERTED [--dtype bfloat16] [--rounds 3]

A round reads the converted files plainly, loads them, and loads the safetensors. Before each the kernel is told to
forget the files (posix_fadvise), and twice as much memory as they take is touched: a virtual machine may have to get it
from its host first, which can take longer than the disk. Nothing else should run meanwhile.
"""

import argparse
import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.checkpoint import open_checkpoint
from jaxllm.checkpoint.orbax_source import OrbaxCheckpoint
from jaxllm.models.loader import load
from jaxllm.models.registry import model_class
from jaxllm.models.restore import restore


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def forget(directory: Path) -> None:
    """Drops the files from the page cache."""
    for path in files_of(directory):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(num_bytes: int) -> None:
    np.empty(num_bytes, np.uint8)[::4096] = 1


def read_plainly(directory: Path, threads: int) -> None:
    """All bytes, in blocks of 4 MiB."""

    def read(path: Path) -> None:
        buffer = bytearray(4 << 20)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, files_of(directory)))


def load_model(directory: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(directory)
    family = model_class(checkpoint.config)
    model = family(family.parse_config(checkpoint.config), dtype=jnp.dtype(dtype))
    (restore if isinstance(checkpoint, OrbaxCheckpoint) else load)(model, checkpoint)
    jax.block_until_ready(jax.tree.leaves(model))


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--dtype", default="bfloat16", help="of the parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(16, 2 * (os.cpu_count() or 1)), help="of the plain reading")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    options = parser.parse_args()
    import orbax.checkpoint  # noqa: F401  imports are not part of the measurement

    size = sum(path.stat().st_size for path in files_of(options.converted)) / 1e9
    print(f"{size:.2f} GB, {jax.default_backend()}, {options.dtype}, {os.cpu_count()} cores")
    work = {
        "plain reading": (options.converted, lambda: read_plainly(options.converted, options.threads)),
        "orbax": (options.converted, lambda: load_model(options.converted, options.dtype)),
        "safetensors": (options.model, lambda: load_model(options.model, options.dtype)),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, (directory, run) in work.items():
            if not options.warm:
                forget(directory)
            touch_memory(int(2e9 * size))
            times[name].append(seconds(run))
    best = {name: min(found) for name, found in times.items()}
    for name, found in times.items():
        print(f"{name:14} {size / best[name]:6.2f} GB/s at best, {size / statistics.median(found):6.2f} GB/s at median")
    print(f"orbax ÷ plain reading {best['plain reading'] / best['orbax']:.2f}")
    print(f"orbax ÷ safetensors   {best['safetensors'] / best['orbax']:.2f}")


if __name__ == "__main__":
    main()
