"""What a measurement was taken on and how: written into every file of results."""

import dataclasses
import datetime
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.bench.floor import Ceilings

ROOT = Path(__file__).resolve().parents[2]
_PLACES = ("--output", "-o", "--json", "--plot")  # where results go says nothing about them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """The circumstances of one file of results.

    Attributes:
      model: as in the peers' figures: without "shape:".
      device, num_devices: JAX's name of the device, and how many the engine uses.
      dtype: of weights and cache.
      options: of `EngineConfig`, those that were set.
      driver: NVIDIA's driver, None elsewhere.
      host: the processor and how many of its threads this process may use.
      jax: the version.
      commit: of jaxllm, with "+" behind it if tracked files were changed; None if git cannot tell.
      command: what was typed.
      date: of the beginning, UTC, ISO 8601.
      ceilings: of all these devices together; None if they were not measured.
      note: what else a reader must know.
    """

    model: str
    device: str
    num_devices: int
    dtype: str
    options: dict[str, Any]
    driver: str | None
    host: str
    jax: str
    commit: str | None
    command: str
    date: str
    ceilings: Ceilings | None = None
    note: str = ""


def gather(
    model: str,
    options: dict[str, Any],
    *,
    device: str,
    num_devices: int,
    dtype: str,
    ceilings: Ceilings | None = None,
    commit: str | None = None,
) -> Facts:
    """The facts of a run that begins now in this process. `commit` says what git cannot, or overrides it."""
    from importlib.metadata import version

    return Facts(
        model=model,
        device=device,
        num_devices=num_devices,
        dtype=dtype,
        options={name: value for name, value in options.items() if name != "compilation_cache_dir"},
        driver=_driver(device),
        host=_host(),
        jax=version("jax"),
        commit=commit or _commit(),
        command=command_line(sys.argv),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ceilings=ceilings,
    )


def command_line(arguments: Sequence[str]) -> str:
    """What was typed, without this machine's paths of the program and of the results."""
    words = ["jaxllm"]
    for before, word in itertools.pairwise(arguments):
        name, _, value = word.partition("=")
        if before in _PLACES:
            word = "PATH"
        elif name in _PLACES and value:
            word = f"{name}=PATH"
        words.append(word)
    return shlex.join(words)


def _output(*command: str) -> str | None:
    """What a program prints; None if there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def _driver(device: str) -> str | None:
    if "NVIDIA" not in device:
        return None
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _host() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {len(os.sched_getaffinity(0))} threads"


def _commit() -> str | None:
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None  # installed, or inside another project's checkout
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")
