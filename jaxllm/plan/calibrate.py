"""A chip's calibration from short runs on it: what the parts of a step cost, so that the predictor gives their times.

`Clock` predicts a step as a sum over its parts, in proportion to what each part costs. So a run's seconds are a sum
over unknowns, with factors that follow from the steps that the scheduler makes of it. Runs of few and many rows, short
and long contexts and prompts, of a large and a small model, tell the unknowns apart, but for attention's, which are a
small part of most steps: its kernels are timed alone besides. All are the least squares solution in which none is
negative (Lawson and Hanson, 1974), of relative errors.
"""

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.plan.chips import Calibration, Chip, chips
from jaxllm.plan.times import Clock, Step

Requests = list[tuple[list[int], int]]  # prompts and how many tokens to generate

# (requests, prompt tokens, output tokens). Products are read off rows of one token, then keys, prompts, both mixed.
RUNS = (
    (1, 32, 96), (16, 32, 64), (64, 32, 64), (128, 32, 48), (256, 16, 48),
    (1, 4096, 64), (1, 16000, 48), (16, 4096, 48), (64, 1024, 48), (128, 512, 40), (256, 256, 40), (256, 512, 24),
    (1, 1024, 1), (1, 2048, 1), (1, 8192, 1), (1, 16000, 1), (8, 2048, 1), (4, 8192, 1), (64, 256, 1), (512, 32, 1),
)  # fmt: skip
ATTENTION = {  # (query tokens, keys) of each row
    "64 × 2048": [(1, 2048)] * 64,
    "8 × 8192": [(1, 8192)] * 8,
    "1 × 8192": [(1, 8192)],
    "1 × 512": [(1, 512)],
    "16 × 128": [(1, 128)] * 16,
    "64 × 128": [(1, 128)] * 64,
    "256 ragged": [(1, 64 + 5 * row // 2) for row in range(256)],
    "8192 prompt": [(8192, 8192)],
    "4 × 2048 prompt": [(2048, 2048)] * 4,
    "2048 after 14336": [(2048, 16384)],
}
MIXED = 160, 600, 64  # requests, and the most tokens of a prompt and of an answer, drawn evenly
DECODE_TILE_ROWS = {"gpu": 64.0, "tpu": 1.0}  # query heads that share one read of common keys: the kernels' own
HOST_BOUND = 0.8  # the host's work on a run over the device's seconds: what is above says nothing of the device
SOME_BOUND = 0.05  # share of a run's steps
_NOTHING = {
    name: 0.0
    for name in (
        "decode_layer_seconds", "decode_row_seconds", "prefill_extra_keys", "layer_seconds", "layer_passes",
        "sampler_seconds", "sampler_passes", "step_seconds", "all_reduce_seconds", "host_step_seconds",
        "host_prompt_token_seconds",
    )
} | {"decode_bandwidth": np.inf, "prefill_flops": np.inf}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on the device.

    Attributes:
      clock: of the model, without a calibration.
      steps: as the scheduler made them.
      seconds: from the first launch to the last token.
      host_seconds: of these, what the engine's loop worked itself, from the first launch on.
      prompt_tokens, admission_seconds: of all prompts, and how long they took before the first launch.
    """

    name: str
    clock: Clock
    steps: Sequence[Step]
    seconds: float
    host_seconds: float
    prompt_tokens: int
    admission_seconds: float

    @property
    def device_seconds(self) -> float:
        """Without the host's work on one step: launching the first one and reading the last is hidden by no other."""
        return self.seconds - self.host_seconds / len(self.steps)

    @property
    def is_of_device(self) -> bool:
        """Whether the device decides how long it takes."""
        return self.host_seconds < HOST_BOUND * self.device_seconds


@dataclasses.dataclass(frozen=True)
class AttentionTime:
    """What the attention kernels of one layer took. `clock`: of the model, without a calibration."""

    clock: Clock
    rows: Sequence[tuple[int, int]]  # query tokens and keys of each
    seconds: float

    @property
    def step(self) -> Step:
        """Of the same attention."""
        spans = [(keys - queries, keys) for queries, keys in self.rows if queries > 1]
        return Step(spans=spans, contexts=[keys for queries, keys in self.rows if queries == 1])


def runs_of(vocab_size: int, max_model_len: int) -> Iterator[tuple[str, Requests]]:
    """What to run, by name: prompts that share nothing. What is too long for the engine is left out."""
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(length)]

    for count, length, output in RUNS:
        if length + output <= max_model_len:
            yield f"{count} × {length} + {output}", [(prompt(length), output) for _ in range(count)]
    count, longest, most = MIXED
    if longest + most <= max_model_len:
        requests = [(prompt(rng.randint(1, longest)), rng.randint(1, most)) for _ in range(count)]
        yield f"{count} mixed", requests


def chip_of(device_kind: str) -> Chip:
    """The chip of this `jax.Device.device_kind`. Raises ConfigError naming those that there are."""
    known = {chip.kind: chip for chip in chips().values()}
    if device_kind not in known:
        raise ConfigError(f"this device is {device_kind!r}: a calibration is of {', '.join(sorted(known))}")
    return known[device_kind]


def _unknowns(knots: Sequence[float], base: Calibration) -> dict[str, tuple[Calibration, Calibration | None]]:
    """Calibrations under which a step takes as long as its factor of an unknown is; where there are two, the difference
    of both. Products: "gemm N" is by how much those of N rows, and of more, take longer than those of the knot before,
    in seconds a byte of weights."""

    def alone(**fields: Any) -> Calibration:
        return dataclasses.replace(base, **fields)

    made: dict[str, tuple[Calibration, Calibration | None]] = {
        f"gemm {knot:g}": (alone(gemm=tuple((at, 1.0 if at >= knot else np.inf) for at in knots)), None)
        for knot in knots
    }
    names = "decode_layer_seconds", "decode_row_seconds", "layer_seconds", "layer_passes", "sampler_seconds"
    made |= {name: (alone(**{name: 1.0}), None) for name in (*names, "sampler_passes", "step_seconds")}
    made["decode_bandwidth"] = alone(decode_bandwidth=1.0), None
    queried = alone(prefill_flops=1.0)
    made["prefill_flops"] = queried, None
    made["prefill_extra_keys"] = dataclasses.replace(queried, prefill_extra_keys=1.0), queried
    made["all_reduce_seconds"] = alone(all_reduce_seconds=1.0), None
    return made


def _device_seconds(clock: Clock, known: Calibration, steps: Sequence[Step]) -> float:
    timed = dataclasses.replace(clock, calibration=known)
    return sum(_seconds(timed, step) for step in steps)


def _seconds(clock: Clock, step: Step) -> float:
    found = clock.predict(step)
    assert found is not None, "calibrations are of bfloat16, and know of sums over shards where there are some"
    return found


def solve(
    chip: Chip, runs: Sequence[Run], attention: Sequence[AttentionTime], bandwidth: float, sources: Sequence[str]
) -> Calibration:
    """The calibration under which runs and attention are predicted best.

    Runs in which the host decides tell how long it takes for a step, and nothing of the device. Which have such steps
    besides longer ones shows once the device's times are known, so that it is fitted again without them.

    Args:
      bandwidth: bytes/s of a copy on one device.
      sources: what the runs were, for the file.

    Raises:
      ConfigError: the runs do not tell the parts apart.
    """
    told = [run for run in runs if run.is_of_device]
    if not told:
        raise ConfigError("the host takes longer than the device for every run: nothing is known of the device")
    bound = [run.seconds / len(run.steps) for run in runs if run not in told and len(run.steps) > 1]
    most = max(runs, key=lambda run: run.prompt_tokens)
    host = {
        "host_step_seconds": min(bound or [run.host_seconds / len(run.steps) for run in runs]),
        "host_prompt_token_seconds": most.admission_seconds / most.prompt_tokens,
    }
    while True:
        found = _fit(chip, told, attention, bandwidth)
        known = dataclasses.replace(found, sources=tuple(sources), **host)  # type: ignore[arg-type]
        kept = [run for run in told if _share_bound(run, found, host["host_step_seconds"]) < SOME_BOUND]
        if len(kept) in (0, len(told)):
            return known
        told = kept


def _share_bound(run: Run, known: Calibration, host_step_seconds: float) -> float:
    """Of its steps, how many the host takes longer for than the device."""
    timed = dataclasses.replace(run.clock, calibration=known)
    return sum(_seconds(timed, step) < host_step_seconds for step in run.steps) / len(run.steps)


def _fit(chip: Chip, runs: Sequence[Run], attention: Sequence[AttentionTime], bandwidth: float) -> Calibration:
    """The device's part. Raises ConfigError as `solve` does."""
    from scipy.optimize import nnls  # JAX needs it, too

    knots = sorted({float(step.num_padded or step.num_tokens) for run in runs for step in run.steps})
    base = Calibration(
        chip=chip.name,
        sources=(),
        bandwidth=bandwidth,
        gemm=tuple((knot, np.inf) for knot in knots),
        decode_tile_rows=DECODE_TILE_ROWS[chip.platform],
        **_NOTHING,
    )
    unknowns = _unknowns(knots, base)

    def row(clock: Clock, steps: Sequence[Step]) -> np.ndarray:
        """Factors of the unknowns."""
        nothing = _device_seconds(clock, base, steps)
        values = [
            _device_seconds(clock, first, steps)
            - (nothing if second is None else _device_seconds(clock, second, steps))
            for first, second in unknowns.values()
        ]
        return np.array(values)

    factors, wanted = [], []
    for run in runs:
        linked = _device_seconds(run.clock, base, run.steps)  # sums over shards, at the links' speed
        factors.append(row(run.clock, run.steps) / run.device_seconds)
        wanted.append(1 - linked / run.device_seconds)
    of_attention = np.array([name.startswith(("decode", "prefill")) for name in unknowns])
    for each in attention:
        layers = len(each.clock.whole.windows)
        factors.append(row(each.clock, [each.step]) * of_attention / layers / each.seconds)
        wanted.append(1.0)
    matrix = np.array(factors)
    scale = np.where(matrix.any(0), np.abs(matrix).max(0), 1.0)
    try:
        solved = nnls(matrix / scale, np.array(wanted))[0] / scale
    except RuntimeError as error:  # too many iterations
        raise ConfigError(f"the runs do not tell the parts of a step apart: {error}") from error
    found = dict(zip(unknowns, solved, strict=True))
    passed = np.cumsum([found.pop(f"gemm {knot:g}") for knot in knots])
    of_keys, of_queries = found.pop("decode_bandwidth"), found.pop("prefill_flops")
    if not (passed[0] > 0 and of_keys > 0 and of_queries > 0):
        raise ConfigError("the runs do not tell products, keys and prompts apart: too few, too short, or too noisy")
    sums = found.pop("all_reduce_seconds")
    return dataclasses.replace(
        base,
        gemm=tuple((knot, 1 / float(each)) for knot, each in zip(knots, passed, strict=True)),
        decode_bandwidth=1 / float(of_keys),
        prefill_flops=1 / float(of_queries),
        prefill_extra_keys=float(found.pop("prefill_extra_keys") / of_queries),
        all_reduce_seconds=float(sums) if any(run.clock.tensor > 1 for run in runs) else None,
        **{name: float(value) for name, value in found.items()},  # type: ignore[arg-type]
    )


def with_source(calibration: Calibration, source: str) -> Calibration:
    """The same with a line more of where it is from."""
    return dataclasses.replace(calibration, sources=(*calibration.sources, source))


def write(calibration: Calibration, path: Path) -> None:
    """As `read_calibration` reads it."""
    fields = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in dataclasses.asdict(calibration).items()
    }
    fields["gemm"] = [[rows, float(f"{speed:.4g}")] for rows, speed in calibration.gemm]
    path.write_text(json.dumps(fields, indent=2) + "\n")


def errors(calibration: Calibration, runs: Sequence[Run]) -> dict[str, float]:
    """Predicted over measured, less one, of each run in which the device decides and of which anything is predicted."""
    found = {}
    for run in [run for run in runs if run.is_of_device]:
        if run.clock.tensor > 1 and calibration.all_reduce_seconds is None:
            continue  # in all such runs there were steps that the host takes longer for
        clock = dataclasses.replace(run.clock, calibration=calibration)
        found[run.name] = sum(_seconds(clock, step) for step in run.steps) / run.device_seconds - 1
    return found
