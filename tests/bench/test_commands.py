"""`jaxllm bench`, each command once over a tiny model."""

import json

import pytest
from typer.testing import CliRunner

from jaxllm.bench.facts import gather
from jaxllm.bench.floor import Ceilings
from jaxllm.bench.page import BEGIN, END
from jaxllm.bench.results import path_of, save
from jaxllm.bench.throughput import choose_workloads, run_throughput
from jaxllm.cli.app import app
from jaxllm.errors import ConfigError, InvalidRequestError


def run(*arguments) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_throughput(tiny_flags, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    text = run(
        "throughput", "static_batch_1", "--num-requests", 3, "--no-ceilings", "--compile-late", "--json", out,
        "--plot", plot, *tiny_flags,
    )  # fmt: skip
    assert "static_batch_1" in text and "output tok/s" in text
    data = json.loads(out.read_text())
    assert data["part"] == "throughput" and data["facts"]["dtype"] == "float32" and data["facts"]["ceilings"] is None
    (result,) = data["results"]
    assert result["num_requests"] == 3 and result["input_tokens"] == 384 and result["output_tokens"] == 192
    assert len(result["all_seconds"]) == 2 and result["seconds"] == min(result["all_seconds"])
    assert result["output_tok_s"] == pytest.approx(192 / result["seconds"])
    assert 0 <= result["padded_share"] < 1 and result["preemptions"] == 0 and result["prefix_hit_share"] == 0
    assert result["steps"] >= 64 and result["floor_seconds"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_throughput_runs_what_fits_the_model(tiny_flags, tmp_path):
    out = tmp_path / "out.json"
    text = run("throughput", "--runs", 1, "--no-ceilings", "--compile-late", "--json", out, *tiny_flags)
    assert [result["workload"] for result in json.loads(out.read_text())["results"]] == ["cpu_single", "cpu_ragged"]
    assert "left out: workload='cpu_prefill': has a request of 1025 tokens (max_model_len=512)" in text
    with pytest.raises(InvalidRequestError, match=r"none fits max_model_len=64"):
        run("throughput", "--no-ceilings", "--compile-late", "--max-model-len", 64, *tiny_flags)


def test_a_named_workload_that_does_not_fit_is_refused_before_any_runs(tiny_flags, monkeypatch):
    monkeypatch.setattr("jaxllm.bench.throughput.run_throughput", lambda *_: pytest.fail("it ran"))
    with pytest.raises(InvalidRequestError, match=r"workload='cpu_prefill': has a request of 1025 tokens"):
        run("throughput", "cpu_single", "cpu_prefill", "--no-ceilings", *tiny_flags)


def test_on_an_accelerator_the_workloads_are_others():
    chosen, left_out = choose_workloads([], 300, 4096, on_cpu=False)
    static = ["static_batch_1", "static_batch_32", "static_batch_128"]
    assert chosen == ["single_stream", "random_1024_128", "ragged", "decode_heavy", "shared_prefix", *static]
    assert list(left_out) == ["prefill_heavy", "long_context"]
    chosen, left_out = choose_workloads([], 300, 4096, on_cpu=True, num_requests=4)
    assert chosen == ["cpu_ragged"] and "cpu_single has one request" in left_out["cpu_single"]


def test_a_failure_keeps_the_results_before_it(tiny_flags, tmp_path, monkeypatch):
    def fails_later(session, name, *rest):
        if name == "cpu_ragged":
            raise RuntimeError("broken")
        return run_throughput(session, name, *rest)

    monkeypatch.setattr("jaxllm.bench.throughput.run_throughput", fails_later)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    names = "cpu_single", "cpu_ragged"
    flags = "--runs", 1, "--no-ceilings", "--compile-late", "--json", out, "--plot", plot
    with pytest.raises(RuntimeError, match="broken"):
        run("throughput", *names, *flags, *tiny_flags)
    assert [result["workload"] for result in json.loads(out.read_text())["results"]] == ["cpu_single"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_latency(tiny_flags, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = "--input-len", 20, "--output-len", 8, "--runs", 2, "--compile-late", "--json", out, "--plot", plot
    text = run("latency", *arguments, *tiny_flags)
    assert "20/8" in text
    data = json.loads(out.read_text())
    assert data["facts"]["ceilings"]["bandwidth"] > 1e8 and data["facts"]["ceilings"]["flops"] > 1e9
    (result,) = data["results"]
    assert 0 < result["tpot_p50"] <= result["tpot_p99"] and result["ttft_p50"] > 0
    assert result["floor_share"] == pytest.approx(result["tpot_floor"] / result["tpot_p50"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_serve(tiny_flags, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    sizes = "--num-requests", 4, "--mean-in", 16, "--mean-out", 8, "--rate", 50, "--rate", 100, "--runs", 2
    limits = "--goodput", "ttft:1e6", "--goodput", "e2el:1e6"
    flags = "--no-engine-process", "--compile-late", "--json", out, "--plot", plot
    text = run("serve", *sizes, *limits, *flags, *tiny_flags)
    assert "TTFT p50" in text and "E2EL" in text and "kept the limits" in text
    first, second = json.loads(out.read_text())["results"]
    assert (first["rate"], second["rate"]) == (50, 100)
    for result in (first, second):
        assert len(result["runs"]) == 2
        for figures in (result["median"], *result["runs"]):
            assert figures["num_requests"] == 4 and figures["total_tok_s"] > figures["output_tok_s"] > 0
            assert figures["goodput_s"] == figures["request_s"]  # nobody takes a quarter of an hour
            for name in ("ttft", "tpot", "itl", "e2el"):
                spread = figures[name]
                assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"] and spread["mean"] > 0
        for name in ("ttft", "e2el"):
            low, high = sorted(run[name]["p50"] for run in result["runs"])
            assert result["median"][name]["p50"] == pytest.approx((low + high) / 2)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_refusals_come_before_work(tiny_flags, monkeypatch):
    with pytest.raises(InvalidRequestError, match="workload='no_such'"):
        run("throughput", "no_such", *tiny_flags)
    with pytest.raises(InvalidRequestError, match="rate="):
        run("serve", "--rate", 0, *tiny_flags)
    for limit in ("itl:5", "ttft", "ttft:0", "ttft:fast"):
        with pytest.raises(InvalidRequestError, match="goodput="):
            run("serve", "--goodput", limit, *tiny_flags)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxllm\[bench\]'"):
        run("throughput", "static_batch_1", "--plot", "x.png", *tiny_flags)


def test_all_writes_the_page_of_its_results(tmp_path, monkeypatch):
    """After the parts; a page that cannot be written is refused before them."""
    page, output, runs = tmp_path / "page.md", tmp_path / "results", []
    facts = gather("any", {}, device="a device", num_devices=1, dtype="float32", commit="0123456789")

    def run_suite(suite, say, done):
        runs.append(suite)
        output.mkdir()
        save(path_of(output, facts, "ceilings"), "ceilings", facts, [Ceilings(2e12, 3e14)])
        return []

    monkeypatch.setattr("jaxllm.bench.suite.run_suite", run_suite)
    command = ["all", "--output", output, "--page", page]
    with pytest.raises(ConfigError, match=r"--page: .*page\.md"):
        run(*command)
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="the page must have the lines"):
        run(*command)
    with pytest.raises(ConfigError, match="--plots needs --page"):
        run("all", "--output", output, "--plots", tmp_path)
    assert not runs
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    assert str(page) in run(*command)
    text = page.read_text()
    assert len(runs) == 1 and text.startswith("before\n") and text.endswith("after\n")
    assert "## a device: any, float32" in text and "| a device | 2,000 | 300 |" in text
