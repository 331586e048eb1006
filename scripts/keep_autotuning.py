#!/usr/bin/env python
"""Adds what XLA has timed on a GPU to what jaxllm ships for GPUs of its kind:

    scripts/keep_autotuning.py COMPILATION_CACHE... --device "NVIDIA H100 80GB HBM3"

COMPILATION_CACHE is the directory of an engine that has compiled all of its steps there (`jaxllm bench all`, say), or a
copy of it that holds at least xla_gpu_per_fusion_autotune_cache_dir. --device is the `device_kind` that JAX gives.
"""

import argparse
from pathlib import Path

from jaxllm.engine.autotuning import keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path, nargs="+", metavar="COMPILATION_CACHE")
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    for cache in options.caches:
        archive, count = keep(cache, options.device)
        print(f"{archive.name}: {count} outcomes, {archive.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
