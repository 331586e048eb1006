"""What other engines reached on the same work: figures kept as data in peers.json, with their source and hardware."""

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("peers.json").read_text())


def figures(
    model: str, workload: str, device: str, num_devices: int, rate: float | None = None
) -> list[dict[str, Any]]:
    """Peers' figures for this work on this kind of device.

    Args:
      model: a name without "shape:", such as "llama-3.1-8b".
      device: what JAX calls the device, such as "NVIDIA H100 80GB HBM3".
      rate: requests/s, for poisson_arrivals.
    """
    return [
        figure
        for figure in _data()["figures"]
        if figure["model"] == model
        and figure["workload"] == workload
        and figure["device"] in device
        and figure["devices"] == num_devices
        and (rate is None or figure.get("rate") == rate)
    ]


def source(engine: str, device: str, num_devices: int) -> str:
    """How and on what an engine's figures for this kind and number of devices were taken.

    Raises:
      KeyError: there are none.
    """
    for each in _data()["sources"]:
        if each["engine"] == engine and each["device"] in device and each["devices"] == num_devices:
            return each["text"]
    raise KeyError(f"{engine} on {num_devices} {device}")
