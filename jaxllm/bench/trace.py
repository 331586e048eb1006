"""What ran on a device and when, by the profiler's record."""

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

Event = tuple[str, float, float]  # name, start, end in ns


@contextlib.contextmanager
def recording() -> Iterator[list[Event]]:
    """Records what the block runs; the list is filled when the block has ended."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0 if jax.default_backend() != "cpu" else 2  # on a CPU kernels are the host's events
    events: list[Event] = []
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-") as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            yield events
        (path,) = Path(directory).rglob("*.xplane.pb")
        events += device_events(ProfileData.from_file(str(path)))


def device_events(profile: ProfileData) -> Iterable[Event]:
    """(name, start, end) in ns of what ran on the first device: a GPU's streams, a TPU's operations, XLA's threads on
    a CPU."""
    planes = {plane.name: plane for plane in profile.planes}
    device = next((planes[name] for name in sorted(planes) if re.fullmatch(r"/device:(GPU|TPU):\d+", name)), None)
    if device is not None:
        lines = [line for line in device.lines if "Stream" in line.name or line.name == "XLA Ops"]
    else:
        lines = [line for line in planes["/host:CPU"].lines if line.name.startswith("tf_XLA")]
    for line in lines:
        for event in line.events:
            if event.duration_ns > 0 and "::" not in event.name:  # those are a CPU executor's own functions
                yield event.name, event.start_ns, event.start_ns + event.duration_ns


def union(spans: list[tuple[float, float]]) -> float:
    """How much of the time line the spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            covered += end - max(start, reached)
            reached = end
    return covered
