#!/usr/bin/env python
"""How fast a converted checkpoint is restored, beside the plain reading of its files:

    scripts/checkpoint_speed.py DIRECTORY [--model MODEL] [--layers N] [--rounds 5] [--safetensors] [--warm]

DIRECTORY holds what `jaxllm convert` wrote. If there is none yet, MODEL (a Hugging Face directory, or shape:NAME for
random bfloat16 weights of a known shape, of its first N layers) is converted into it; shape:NAME is written beside it
first, as DIRECTORY-safetensors.

What a round does, each with the files out of the page cache (posix_fadvise; --warm: all in it):

    plain          reads all files, each thread into one buffer that it uses again
    plain, fresh   reads all files into memory that is as large as they are
    restore        makes the model, with its parameters on the device
    safetensors    the same from MODEL

Memory is touched before, as much as the files take twice: a virtual machine may have to get it from its host first,
which can take longer than the disk. Nothing else should run meanwhile. Ratios are of medians.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore  # noqa: F401  imports are not part of the measurement

from jaxllm.bench.models import PREFIX
from jaxllm.bench.workloads import MODEL_SHAPES
from jaxllm.checkpoint import open_checkpoint
from jaxllm.checkpoint.orbax_source import MANIFEST
from jaxllm.models.loader import load, parameters_of
from jaxllm.models.registry import model_class
from jaxllm.models.sources import Parts

BLOCK = 8 << 20  # bytes


def write_random(directory: Path, config: dict, seed: int = 0) -> None:
    """A Hugging Face directory of random bits, in one safetensors file. NaN among them does no harm here."""
    family = model_class(config)
    model = family(family.parse_config(config), dtype=jnp.bfloat16)
    shapes = dict(tensor for path, each in parameters_of(model) for tensor in Parts(path, each).tensors())
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, at, BLOCK):
            file.write(random.bytes(min(BLOCK, at - start)))


def model_directory(model: str, directory: Path, layers: int | None) -> Path:
    """Where MODEL's safetensors are."""
    if not model.startswith(PREFIX):
        return Path(model)
    found = directory.with_name(directory.name + "-safetensors")
    if not found.exists():
        config = MODEL_SHAPES[model.removeprefix(PREFIX)]
        write_random(found, config | {"num_hidden_layers": layers or config["num_hidden_layers"]})
    return found


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in files_of(directory))


def forget(directory: Path) -> None:
    """Drops the files from the page cache."""
    for path in files_of(directory):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(directory: Path) -> float:
    """Of the files' blocks, those that can be read at once without the disk."""
    cached, blocks, buffer = 0, 0, bytearray(4096)
    for path in files_of(directory):
        with open(path, "rb", buffering=0) as file:
            for start in range(0, path.stat().st_size, BLOCK):
                blocks += 1
                with contextlib.suppress(BlockingIOError):
                    cached += os.preadv(file.fileno(), [buffer], start, os.RWF_NOWAIT) > 0
    return cached / blocks


def touch_memory(num_bytes: int, threads: int) -> None:
    memory = np.empty(num_bytes, np.uint8)

    def touch(part: np.ndarray) -> None:
        part[::4096] = 1

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(touch, np.array_split(memory, threads)))


def read_plainly(directory: Path, threads: int, fresh: bool) -> None:
    """All bytes, as many blocks at once as there are threads."""
    kept = []

    def read(share: list[tuple[Path, int, int]]) -> None:
        buffer = memoryview(np.empty(BLOCK, np.uint8))
        for path, start, size in share:
            if fresh:
                buffer = memoryview(np.empty(size, np.uint8))
                kept.append(buffer)
            with open(path, "rb", buffering=0) as file:
                while size and (count := os.preadv(file.fileno(), [buffer[:size]], start)):
                    start, size = start + count, size - count

    pieces = list(_pieces(directory))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, [[piece] for piece in pieces] if fresh else [pieces[i::threads] for i in range(threads)]))


def _pieces(directory: Path) -> Iterator[tuple[Path, int, int]]:
    for path in files_of(directory):
        size = path.stat().st_size
        for start in range(0, size, BLOCK):
            yield path, start, min(BLOCK, size - start)


def load_model(directory: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(directory)
    family = model_class(checkpoint.config)
    model = family(family.parse_config(checkpoint.config), dtype=jnp.dtype(dtype))
    load(model, checkpoint)
    jax.block_until_ready(jax.tree.leaves(model))


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", help="a Hugging Face directory, or shape:NAME")
    parser.add_argument("--layers", type=int, help="of shape:NAME; default: all")
    parser.add_argument("--dtype", default="bfloat16", help="of the parameters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=16, help="of the plain reading")
    parser.add_argument("--safetensors", action="store_true", help="load MODEL, too")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    options = parser.parse_args()
    directory = options.directory.resolve()
    if options.safetensors and options.model is None:
        parser.error("--safetensors needs --model")
    source = None if options.model is None else model_directory(options.model, directory, options.layers)
    if not (directory / MANIFEST).exists():
        if source is None:
            parser.error(f"{directory} holds no converted checkpoint: name a --model to convert")
        from jaxllm.models.convert import convert

        took = seconds(lambda: convert(open_checkpoint(source), directory))
        print(f"converted in {took:.0f} s", flush=True)

    threads, cores = options.threads, os.cpu_count() or 1
    work = {
        "plain": (directory, lambda: read_plainly(directory, threads, fresh=False)),
        "plain, fresh": (directory, lambda: read_plainly(directory, threads, fresh=True)),
        "restore": (directory, lambda: load_model(directory, options.dtype)),
    }
    if options.safetensors:
        assert source is not None
        work["safetensors"] = (source, lambda: load_model(source, options.dtype))
    size = size_of(directory)
    print(f"{size / 1e9:.2f} GB, {jax.devices()[0].device_kind}, {options.dtype}, {cores} cores", flush=True)
    times: dict[str, list[float]] = {name: [] for name in work}
    cached: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(options.rounds):
        names = list(work)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            of, run = work[name]
            touch_memory(2 * size, cores)
            if options.warm:
                read_plainly(of, threads, fresh=False)
            else:
                forget(of)
            cached[name].append(cached_share(of))
            times[name].append(seconds(run))
            print(f"round {turn + 1}: {name} {size / 1e9 / times[name][-1]:.2f} GB/s", flush=True)
    speeds = {name: [size / 1e9 / found for found in of] for name, of in times.items()}
    for name, found in speeds.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:12} {statistics.median(found):6.2f} GB/s at median ({spread}), {max(cached[name]):.0%} in cache")
    for name in speeds:
        if name != "restore":
            ratio = statistics.median(times[name]) / statistics.median(times["restore"])
            print(f"restore ÷ {name:12} {ratio:.2f}")


if __name__ == "__main__":
    main()
