"""Chips as data: what is published of them (chips.json), and what was measured on them (calibrations/)."""

import dataclasses
import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxllm.bench.floor import Ceilings
from jaxllm.engine.platform import memory_fraction
from jaxllm.errors import ConfigError

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Published figures; the fields are told in chips.json. Rates and memory are of a chip; a mesh is made of devices.

    Attributes:
      name: what the user types.
    """

    name: str
    kind: str
    platform: str
    attention_backend: str
    cores: int
    devices: int
    on_chip: int
    memory: int
    bandwidth: float
    flops: float
    topology: str
    dimensions: int
    links: int
    link_bandwidth: float
    domain: int
    sources: tuple[str, ...]

    def device_limit(self, num_devices: int) -> int:
        """Bytes that JAX may use of each of so many devices of an engine, as the engine's settings have it."""
        share = memory_fraction(num_devices) if self.platform == "gpu" else 1.0
        return int(self.memory * share) // self.devices

    @property
    def ceilings(self) -> Ceilings:
        """Of one device."""
        return Ceilings(self.bandwidth / self.devices, self.flops / self.devices)

    def all_reduce_seconds(self, num_bytes: float, shards: int) -> float:
        """The least time of summing `num_bytes` over that many devices, which each then hold.

        Every device sends 2 (n - 1) / n of the bytes (Patarasuk and Yuan, 2009): through a switch over all its links,
        in a torus over one link for each dimension that so few chips span, since slices below a full axis do not wrap
        around. The devices of one chip share its links, and what they send each other is not counted.
        """
        chips = -(-shards // self.devices)
        if chips <= 1:
            return 0.0
        links = self.links
        if self.dimensions:
            links = min(self.dimensions, (chips - 1).bit_length())
        return 2 * (chips - 1) / chips * num_bytes / (links * self.link_bandwidth)


def chips() -> dict[str, Chip]:
    """All chips by name."""
    found = json.loads((HERE / "chips.json").read_text())["chips"]
    return {name: Chip(name=name, **{**fields, "sources": tuple(fields["sources"])}) for name, fields in found.items()}


def chip(name: str) -> Chip:
    """The chip of this name, in any case. Raises ConfigError naming those that there are."""
    known = chips()
    if name.lower() not in known:
        raise ConfigError(f"chip={name!r}: must be one of {', '.join(known)}")
    return known[name.lower()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What jaxllm's parts reach on one device of a chip, in bfloat16, and on the host that it was taken with.

    Times of a step's parts on the device add up: they do not overlap. The host's part does, with the step before.

    Attributes:
      chip: its name in chips.json.
      sources: what was measured, on what and when.
      bandwidth: bytes/s of a copy, which elementwise work reaches too.
      gemm: (rows, bytes/s of weights read) of a step's products with so many rows, by rows; what lies between is
        interpolated in time, what lies beyond the last costs in proportion to the rows.
      decode_bandwidth: bytes/s of keys and values in a long decode.
      decode_layer_seconds: what a layer's decode attention costs besides, kernels' starts and merges included.
      decode_row_seconds: what each row adds to that.
      decode_tile_rows: query heads, of several rows, that share one read of common keys.
      prefill_flops: FLOP/s of attention where every query sees very many keys.
      prefill_extra_keys: keys that a query costs beyond those that it sees: tiles cut by the diagonal.
      layer_seconds: what a layer costs besides products and attention, for any number of tokens.
      layer_passes: times that a token's hidden row goes through memory in a layer besides.
      sampler_seconds: what sampling costs besides its passes.
      sampler_passes: times that a row's float32 logits go through memory.
      step_seconds: what a step costs besides: gaps between kernels and between steps.
      all_reduce_seconds: what an all-reduce costs besides its bytes; None: it was not measured, and nothing is known of
        several devices together.
      host_step_seconds: what the host takes to launch a step and to read one, so that no step is shorter.
      host_prompt_token_seconds: what the host takes for a token of a prompt before the first step: checks, the hashes
        of pages.
    """

    chip: str
    sources: tuple[str, ...]
    bandwidth: float
    gemm: tuple[tuple[float, float], ...]
    decode_bandwidth: float
    decode_layer_seconds: float
    decode_row_seconds: float
    decode_tile_rows: float
    prefill_flops: float
    prefill_extra_keys: float
    layer_seconds: float
    layer_passes: float
    sampler_seconds: float
    sampler_passes: float
    step_seconds: float
    all_reduce_seconds: float | None
    host_step_seconds: float
    host_prompt_token_seconds: float

    def gemm_seconds(self, rows: float, weight_bytes: float) -> float:
        """Products of `rows` rows with weights of so many bytes."""
        points = [(at, 1 / speed) for at, speed in self.gemm]
        if rows >= points[-1][0]:
            return weight_bytes * points[-1][1] * rows / points[-1][0]
        for (low, before), (high, after) in pairwise(points):
            if rows <= high:
                return weight_bytes * (before + (after - before) * max(rows - low, 0.0) / (high - low))
        return weight_bytes * points[0][1]


@functools.cache
def _calibrations() -> dict[str, Calibration]:
    found = [read_calibration(path) for path in sorted((HERE / "calibrations").glob("*.json"))]
    return {each.chip: each for each in found}


def calibration_of(chip: Chip) -> Calibration | None:
    """What was measured on this chip, if anything was."""
    return _calibrations().get(chip.name)


def read_calibration(path: Path) -> Calibration:
    """A calibration from its file.

    Raises:
      ConfigError: the file is missing or is no calibration; names the fields at fault.
    """
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibration={str(path)!r}: {error}") from error
    wanted = {field.name for field in dataclasses.fields(Calibration)}
    if not isinstance(found, dict) or found.keys() != wanted:
        given = set(found) if isinstance(found, dict) else set()
        raise ConfigError(
            f"calibration={str(path)!r}: must be an object; missing: {sorted(wanted - given)}, unknown: "
            f"{sorted(given - wanted)}"
        )
    try:
        gemm = tuple(sorted((float(rows), float(speed)) for rows, speed in found.pop("gemm")))
        chip, sources = str(found.pop("chip")), tuple(found.pop("sources"))
        numbers: dict[str, Any] = {
            name: None if name == "all_reduce_seconds" and value is None else float(value)
            for name, value in found.items()
        }
    except (TypeError, ValueError) as error:
        raise ConfigError(f"calibration={str(path)!r}: {error}") from error
    if not gemm or min(speed for _, speed in gemm) <= 0 or min(rows for rows, _ in gemm) <= 0:
        raise ConfigError(f"calibration={str(path)!r}: gemm must hold pairs of positive numbers")
    for name, value in numbers.items():
        if value is not None and (value < 0 or (value == 0 and not name.endswith(("_seconds", "_passes", "_keys")))):
            raise ConfigError(f"calibration={str(path)!r}: {name}={value!r}: must be positive")
    return Calibration(chip=chip, sources=sources, gemm=gemm, **numbers)
