"""`jaxllm bench all`: every part writes its file, and what fails or is killed takes nothing with it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from jax.profiler import ProfileData
from typer.testing import CliRunner

from jaxllm.async_llm import AsyncLLM
from jaxllm.bench import busy, results, suite, trace
from jaxllm.bench.facts import command_line
from jaxllm.bench.memory import MemoryResult
from jaxllm.cli.app import app
from jaxllm.errors import ConfigError, InvalidRequestError

ROOT = Path(__file__).resolve().parents[2]
ONLINE = ("--rate", "200", "--num-requests", "3", "--mean-in", "16", "--mean-out", "8", "--serve-runs", "2")
SMALL = ("--workload", "static_batch_1", "--runs", "1", *ONLINE)
BUSY = ("--busy", "static_batch_1", "--busy", "cpu_ragged")
HERE = [part for part in suite.PARTS if part != "start"]  # in this process


def run_all(*arguments, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", "all", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def files(directory) -> dict[str, results.Part]:
    """The parts that lie there, each read as `bench report` reads it."""
    parts = [results.load(path) for path in directory.glob("*.json")]
    return {part.part: part for part in parts}


@pytest.fixture(scope="module")
def everything(tiny_flags, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    text = run_all(*tiny_flags, "--output", output, "--only", ",".join(HERE), *SMALL, *BUSY, "--commit", "abc1234")
    return text, output


def test_every_part_has_its_file_with_its_facts(everything):
    text, output = everything
    found = files(output)
    assert set(found) == set(HERE)
    for part in found.values():
        facts = part.facts
        assert (facts.device, facts.num_devices, facts.dtype, facts.driver) == ("cpu", 1, "float32", None)
        assert facts.commit == "abc1234" and facts.jax and facts.host and facts.date.startswith("20")
        assert facts.command.startswith("jaxllm") and "compilation_cache_dir" not in facts.options
        assert facts.options["page_size"] == 16 and part.results
    names = {path.name for path in output.iterdir()}
    assert names == {f"cpu-{found['serve'].facts.model}-{part}.json" for part in HERE}
    assert "has failed" not in text


def test_what_the_parts_found(everything):
    _, output = everything
    found = {name: part.results for name, part in files(output).items()}
    (parity,) = found["parity"]
    assert (parity.backend, parity.reference, parity.agrees) == ("xla", "reference", True)
    assert parity.num_tokens == 18 * 48 and parity.compared == "logits"
    assert max(parity.worst_largest, parity.worst_error, parity.worst_gap) < 1e-3  # in float32
    assert parity.rounding_worst == parity.rounding_mean == 0.0 and parity.backend_mean == parity.mean_error
    (ceilings,) = found["ceilings"]
    assert ceilings.bandwidth > 1e8 and ceilings.flops > 1e9
    assert {(r.kind, r.backend, r.page_size) for r in found["attention"]} == {
        ("decode", "xla", 16),
        ("prefill", "xla", 16),
    }
    for r in found["attention"]:
        assert r.share == pytest.approx(
            r.bandwidth / ceilings.bandwidth if r.kind == "decode" else r.flops / ceilings.flops
        )
    (workload,) = found["throughput"]
    assert workload.workload == "static_batch_1" and workload.output_tokens == 64
    assert workload.floor_seconds / workload.seconds == pytest.approx(workload.floor_share)
    assert [r.after for r in found["memory"]] == ["warm-up", "throughput", "serve"]
    for r in found["memory"]:
        assert isinstance(r, MemoryResult) and r.weights > 0 and r.step > 0 and r.budget is None
        assert r.live >= r.weights + r.cache > r.weights  # the plan's weights and pages are there
    one, traced = found["busy"]
    assert one.workload == "static_batch_1" and one.steps >= 64 and one.busy_seconds > 0
    assert traced.workload == "cpu_ragged" and 0 < traced.busy_seconds <= traced.kernel_seconds
    assert 0 < traced.busy_share <= 1 and 0 <= traced.padded_share < 1 and traced.steps > 64
    assert len({kernel.name for kernel in traced.kernels}) == len(traced.kernels) and traced.busy_share_untraced is None
    assert 0 < traced.launch_seconds < traced.host_seconds and traced.host_seconds * traced.steps < traced.seconds
    assert sum(kernel.seconds for kernel in traced.kernels) <= traced.kernel_seconds * (1 + 1e-9)
    assert traced.kernels == sorted(traced.kernels, key=lambda kernel: -kernel.seconds)
    (rate,) = found["serve"]
    assert rate.rate == 200 and len(rate.runs) == 2 and rate.median.late_compilations == 0


def test_starts_are_processes_of_their_own(tiny_flags, tmp_path):
    run_all(*tiny_flags, "--output", tmp_path, "--only", "start", "--max-num-seqs", 1, "--token-rungs", 64)
    part = files(tmp_path)["start"]
    assert (part.facts.device, part.facts.num_devices, part.facts.dtype) == ("cpu", 1, "float32")
    empty, full = part.results
    assert (empty.cache, full.cache) == ("empty", "full") and empty.num_executables == full.num_executables > 2
    for result in (empty, full):
        times = [result.imported, result.ready, result.first_token, result.answered, result.compiled]
        assert times == sorted(times) and times[0] > 0
        assert result.engine_start == pytest.approx(result.first_token - result.imported)


def test_a_start_that_fails_is_told(tiny_flags, tmp_path):
    text = run_all(*tiny_flags, "--output", tmp_path, "--only", "start", "--max-model-len", 100_000, status=1)
    assert "start has failed: EngineDeadError" in text and not list(tmp_path.iterdir())


def test_parts_are_chosen(tiny_flags, tmp_path):
    run_all(*tiny_flags, "--output", tmp_path, "--only", "ceilings,memory", "--compile-late")
    assert set(files(tmp_path)) == {"ceilings", "memory"}
    (memory,) = files(tmp_path)["memory"].results
    assert memory.after == "start"
    with pytest.raises(InvalidRequestError, match="only='speed': must be one of start, parity"):
        run_all(*tiny_flags, "--output", tmp_path, "--only", "memory,speed")
    for option in ("--workload", "--busy"):
        with pytest.raises(InvalidRequestError, match="workload='no_such'"):
            run_all(*tiny_flags, "--output", tmp_path, option, "no_such")


def test_a_part_that_fails_keeps_what_it_has_and_leaves_the_others_alone(tiny_flags, tmp_path, monkeypatch):
    def fails_later(session, name, runs):
        if name == "cpu_ragged":
            raise RuntimeError("broken")
        return whole(session, name, runs)

    whole = suite.run_throughput
    monkeypatch.setattr(suite, "run_throughput", fails_later)
    flags = "--only", "throughput,serve", "--compile-late", "--runs", 1, *ONLINE
    text = run_all(*tiny_flags, "--output", tmp_path, *flags, status=1)
    assert "throughput has failed: RuntimeError: broken" in text
    found = files(tmp_path)
    assert [r.workload for r in found["throughput"].results] == ["cpu_single"]
    assert len(found["serve"].results) == 1


def test_a_killed_run_keeps_its_parts(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--output", str(tmp_path), "--only", "ceilings,throughput", "--compile-late"]
    endless = ["--runs", "1", "--workload", "cpu_single"] + ["--workload", "static_batch_128"] * 100
    command = [sys.executable, "-m", "jaxllm", "bench", "all", *flags, *endless]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*-throughput.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = files(tmp_path)
    assert set(found) == {"ceilings", "throughput"}
    assert found["throughput"].results[0].workload == "cpu_single"


def test_an_engine_that_is_given_brings_its_own_options():
    async def open_it() -> None:
        AsyncLLM(engine=object(), page_size=16)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="options page_size: the engine given"):
        asyncio.run(open_it())


def test_saving_never_shows_half_a_file(everything, tmp_path, monkeypatch):
    _, output = everything
    part = files(output)["throughput"]
    path = tmp_path / "x.json"
    results.save(path, part.part, part.facts, part.results)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        results.save(path, part.part, part.facts, part.results * 2)
    assert path.read_bytes() == before


def test_files_that_are_none_are_refused(tmp_path):
    for name, content in (
        ("a", "{"),
        ("b", "{}"),
        ("c", json.dumps({"part": "throughput", "facts": {}, "results": []})),
    ):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ConfigError, match=f"{name}: is no file of results"):
            results.load(path)
    with pytest.raises(ConfigError, match="no results"):
        results.load_all([tmp_path])


def test_a_trace_that_ends_early_is_no_result(monkeypatch):
    monkeypatch.setattr(busy, "run_once", lambda *_: (5.0, None))  # so long that the few events are no record of it
    monkeypatch.setattr(busy, "workload", lambda *_: [])
    monkeypatch.setattr(trace, "device_events", lambda _: [("gemm", 0, 1e9), ("gemm", 3e9, 3.5e9)])
    with pytest.raises(RuntimeError, match=r"recorded 3\.50 s of 5\.00 s"):
        busy.measure_busy(SimpleNamespace(vocab_size=10), "cpu_ragged")  # type: ignore[arg-type]


GPU_TRACE = """
planes { name: "/host:CPU" lines { name: "tf_XLAPjRtCpuClient/1" events { metadata_id: 1 duration_ps: 9000000 } }
         event_metadata { key: 1 value { id: 1 name: "of the host" } } }
planes { name: "/device:GPU:1" lines { name: "Stream #7(Compute)" events { metadata_id: 1 duration_ps: 9000000 } }
         event_metadata { key: 1 value { id: 1 name: "of another device" } } }
planes { name: "/device:GPU:0"
         lines { name: "Stream #7(Compute)" timestamp_ns: 100
                 events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
                 events { metadata_id: 2 offset_ps: 6000000 duration_ps: 1000000 } }
         lines { name: "Stream #9(MemcpyD2H)" timestamp_ns: 100
                 events { metadata_id: 3 offset_ps: 3000000 duration_ps: 2000000 } }
         lines { name: "XLA Modules" timestamp_ns: 100 events { metadata_id: 1 duration_ps: 9000000 } }
         event_metadata { key: 1 value { id: 1 name: "gemm" } }
         event_metadata { key: 2 value { id: 2 name: "attention" } }
         event_metadata { key: 3 value { id: 3 name: "copy" } } }
"""


def test_of_a_gpus_trace_the_first_devices_streams_count():
    profile = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(GPU_TRACE))
    events = list(trace.device_events(profile))
    assert sorted((name, end - start) for name, start, end in events) == [
        ("attention", 1000),
        ("copy", 2000),
        ("gemm", 4000),
    ]
    assert trace.union([(start, end) for _, start, end in events]) == 6000  # a copy runs beside a product for 1000


def test_busy_time_counts_overlapping_kernels_once():
    assert trace.union([(5, 7), (0, 2), (1, 3), (1, 2), (7, 8)]) == 6
    assert trace.union([]) == 0


def test_commands_are_told_without_paths_of_results():
    typed = ["/usr/bin/jaxllm", "bench", "all", "-o", "/tmp/x", "--only", "serve", "--json=/tmp/y"]
    assert command_line(typed) == "jaxllm bench all -o PATH --only serve --json=PATH"
