#!/usr/bin/env python3
"""Whole models compiled for TPUs that are not there: does a step fit, what does it move, multiply and exchange?

    PYTHONPATH=. python scripts/tpu_steps.py [--only TEXT] [--steps NAME ...] [--layers N]

Needs libtpu (the development packages have it) and no TPU. For each model and slice it compiles the engine's forward
pass and greedy sampler as the engine runs them, and prints a row of the table in docs/tpu.md, which explains it.

Steps: `decode`, 64 rows of 1024 tokens; `prefill`, a prompt of 2048, which is as much as a step takes; `long`, as
much of a prompt after 6144 tokens of it; `batch`, 8 prompts of 256; `short`, 64 of 32; `ragged`, 64 of 17 to 47;
`mixed`, 64 rows of 1024 beside as much of a prompt as fits; `full`, 256 rows that fill the cache, of 1024 tokens at
most; `brief`, 256 of 127.
A row takes from seconds to minutes, that of 80 layers longest. Exit status 1 if a step does not fit, copies a weight
or a cache, or exchanges what the design does not name.
"""

import argparse
import dataclasses
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.tpu_steps import CASES, Engine, Measured, Step, decode_step, measure, prefill_step, ragged_step, unnamed

COLUMNS = (
    "model, slice",
    "step",
    "HBM a device, GB",
    "of",
    "cache, tokens",
    "bytes, GB",
    "÷ weights, cache",
    "÷ least",
    "TFLOP",
    "÷ least",
    "fillers ÷ least",
    "time ÷ least",
    "collectives",
    "copies",
)


def steps_of(engine: Engine, names: list[str]) -> list[Step]:
    most = min(1024, engine.fit.cache_tokens // 256 // 64 * 64)
    known = {
        "decode": decode_step(64, 1024),
        "prefill": prefill_step(1, 2048),
        "long": Step("prefill 2048 after 6144", (2048,), (8192,)),
        "batch": prefill_step(8, 256),
        "short": prefill_step(64, 32),
        "ragged": ragged_step(64, 32),
        "mixed": Step("decode 64 × 1024, prefill 1984", (1,) * 64 + (1984,), decode_step(64, 1024).kv_lens + (1984,)),
        "full": decode_step(256, most),
        "brief": decode_step(256, 127),
    }
    return [known[name] for name in names]


def row(found: Measured) -> list[str]:
    case, forward = found.engine.case, found.forward
    exchanged = [f"{count} {name}" for part in (forward, found.sample) for name, count in part.collectives.items()]
    copied = len(forward.copies) + len(found.sample.copies)
    return [
        f"{case.model}, {case.topology or case.chip + ':1'}",
        found.step.name,
        f"{(forward.argument_bytes + forward.temporary_bytes) / 1e9:.2f}",
        f"{found.engine.chip.device_limit(1) / 1e9:.2f}",
        str(found.engine.fit.cache_tokens),
        f"{found.work.bytes / 1e9:.3f}",
        f"{found.work.bytes / found.minimum.bytes:.3f}",
        f"{found.work.bytes / found.minimum_with_activations.bytes:.3f}",
        f"{found.work.flops / 1e12:.3f}",
        f"{found.work.flops / found.minimum.flops:.3f}",
        f"{(found.with_fillers.flops - found.work.flops) / found.minimum.flops:.3f}",
        f"{found.least_time_ratio:.3f}",
        ", ".join(exchanged) or "none",
        str(copied),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models and slices whose name has this in it")
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=("decode", "prefill", "long", "batch", "short", "ragged", "mixed", "full", "brief"),
        default=["decode", "prefill"],
    )
    parser.add_argument("--layers", type=int, help="how many layers of each model; all of them by default")
    options = parser.parse_args()
    wrong = 0
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS), flush=True)
    for case in CASES:
        if options.only in str(case):
            engine = Engine(dataclasses.replace(case, layers=options.layers))
            for step in steps_of(engine, options.steps):
                begin = time.monotonic()
                found = measure(engine, step)
                print("|", " | ".join(row(found)), "|", flush=True)
                faults = [*unnamed(found), *found.forward.copies, *found.sample.copies]
                wrong += not found.fits or bool(faults)
                print(f"{case}, {step.name}: {time.monotonic() - begin:.0f} s", *faults, file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
