"""Files of results: one JSON object a part, written anew after every result, so that a killed run keeps what it has."""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from jaxllm.bench.attention import AttentionResult
from jaxllm.bench.busy import BusyResult
from jaxllm.bench.facts import Facts
from jaxllm.bench.floor import Ceilings
from jaxllm.bench.latency import LatencyResult
from jaxllm.bench.memory import MemoryResult
from jaxllm.bench.parity import ParityResult
from jaxllm.bench.serve import RateResult
from jaxllm.bench.start import StartResult
from jaxllm.bench.throughput import ThroughputResult
from jaxllm.errors import ConfigError

# What the results of each part are.
KINDS: dict[str, type] = {
    "start": StartResult,
    "ceilings": Ceilings,
    "attention": AttentionResult,
    "memory": MemoryResult,
    "parity": ParityResult,
    "throughput": ThroughputResult,
    "busy": BusyResult,
    "serve": RateResult,
    "latency": LatencyResult,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One file: the part's name, its facts, and results of `KINDS[part]`."""

    part: str
    facts: Facts
    results: list[Any]


def stem_of(facts: Facts, part: str) -> str:
    """The name of a part's files without a suffix: device, model and part."""
    device = re.sub(r"[^a-z0-9]+", "-", facts.device.lower()).strip("-")
    number = f"{facts.num_devices}x-" if facts.num_devices > 1 else ""
    return f"{number}{device}-{facts.model.replace('/', '-')}-{part}"


def path_of(directory: Path, facts: Facts, part: str) -> Path:
    """Where a part's results go."""
    return directory / f"{stem_of(facts, part)}.json"


def save(path: Path, part: str, facts: Facts, results: Sequence[Any]) -> None:
    """Replaces the file as a whole: who reads it, or kills this process, meets the old one or the new one."""
    text = msgspec.json.format(msgspec.json.encode(Part(part, facts, list(results))), indent=1)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(text + b"\n")
    os.replace(temporary, path)


def load(path: Path) -> Part:
    """Reads a file. Raises ConfigError naming the file and the field that is wrong."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=Part)
        kind = KINDS.get(raw.part)
        if kind is None:
            raise ConfigError(f"{path}: part={raw.part!r}: must be one of {', '.join(KINDS)}")
        return Part(raw.part, raw.facts, msgspec.convert(raw.results, list[kind]))  # type: ignore[valid-type]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: is no file of results: {error}") from error


def load_all(places: Iterable[Path]) -> list[Part]:
    """Every file of results in these directories, and these files; of several for one model, device and part the
    latest. Raises ConfigError as `load` does, and if there is none."""
    found: dict[tuple, Part] = {}
    looked = []
    for place in places:
        looked.append(str(place))
        for path in sorted(place.glob("*.json")) if place.is_dir() else [place]:
            part = load(path)
            key = part.facts.device, part.facts.num_devices, part.facts.model, part.facts.dtype, part.part
            if key not in found or found[key].facts.date <= part.facts.date:
                found[key] = part
    if not found:
        raise ConfigError(f"no results (*.json) in {', '.join(looked)}")
    return list(found.values())
