"""What the peers' scripts share. Runs in every peer's environment, so it imports the standard library alone."""

import importlib.util
import json
import os
import resource
import time
from pathlib import Path
from types import ModuleType

WORKLOADS = Path(__file__).resolve().parents[2] / "jaxllm" / "bench" / "workloads.py"


def workloads() -> ModuleType:
    """jaxllm.bench.workloads, loaded from its file: a peer's environment has no jaxllm."""
    spec = importlib.util.spec_from_file_location("workloads", WORKLOADS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start_seconds() -> float:
    """Seconds since this process was started (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def emit(*, engine: str, decode: float, prefill: float, ragged: float, first_token: float) -> None:
    """Prints one engine's figures: tokens a second, seconds from process start to first token, and peak memory."""
    figures = {
        "engine": engine,
        "decode": decode,
        "prefill": prefill,
        "ragged": ragged,
        "first_token": first_token,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps({name: value if isinstance(value, str) else round(value, 3) for name, value in figures.items()}))
