"""docs/performance.md is what the kept results say."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxllm.bench import page, tables
from jaxllm.bench.facts import Facts
from jaxllm.bench.floor import Ceilings
from jaxllm.bench.plots import plot_part
from jaxllm.bench.results import KINDS, Part, load_all, save
from jaxllm.bench.serve import RateResult, ServeResult, Spread
from jaxllm.bench.throughput import ThroughputResult
from jaxllm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FACTS = Facts(
    model="llama-3.1-8b",
    device="NVIDIA H100 80GB HBM3",
    num_devices=1,
    dtype="bfloat16",
    options={},
    driver="1.2",
    host="a processor, 2 threads",
    jax="0.0",
    commit="0123456789+",
    command="jaxllm bench",
    date="2026-01-02T03:04:05+00:00",
    ceilings=Ceilings(3e12, 8e14),
)


def throughput(name: str, seconds: float, tokens: int = 1000) -> ThroughputResult:
    return ThroughputResult(
        workload=name, num_requests=1, input_tokens=tokens, output_tokens=tokens, seconds=seconds,
        all_seconds=[seconds], output_tok_s=tokens / seconds, total_tok_s=2 * tokens / seconds, bandwidth=1.0,
        flops=1.0, floor_seconds=1.0, floor_share=1 / seconds, steps=1, padded_share=0.25, late_compilations=0,
        preemptions=0, prefix_hit_share=0.0,
    )  # fmt: skip


def online(rate: float) -> RateResult:
    spread = Spread(0.04, 0.02, 0.05, 0.06)
    result = ServeResult(rate, 256, 10.0, rate, 500.0, 2500.0, spread, spread, spread, spread, None, 0, 0)
    return RateResult(rate, result, [result])


def test_the_page_is_what_the_kept_results_say():
    text = (ROOT / "docs" / "performance.md").read_text()
    parts = load_all([ROOT / "docs" / "results"])
    again = page.replace(text, page.render(parts, "plots"))
    assert again == text, "run `jaxllm bench report --page docs/performance.md --plots docs/plots`"


def test_the_pages_plots_are_there_and_small():
    text = (ROOT / "docs" / "performance.md").read_text()
    shown = {ROOT / "docs" / name for name in re.findall(r"!\[[^]]*\]\((plots/[^)]+)\)", text)}
    assert shown == set((ROOT / "docs" / "plots").iterdir())
    assert all(path.stat().st_size < 100_000 for path in shown)


def test_ratios_and_their_mean():
    (table,) = tables.throughput(FACTS, [throughput("single_stream", 3.342 / 2), throughput("decode_heavy", 7.768 * 2)])
    ours, theirs = (table.columns.index(name) for name in ("jaxllm ÷ vLLM 0.24.0", "vLLM 0.24.0, output tok/s"))
    assert [row[ours] for row in table.rows] == ["2.00", "0.50"]
    assert [row[theirs] for row in table.rows] == ["153.2", "16,873"]
    assert table.notes[0] == "Geometric mean of jaxllm ÷ vLLM 0.24.0 over 2 workloads: 1.000."
    assert not any("fp8" in column for column in table.columns)
    assert table.rows[0][-3:] == ["1.000", "59.8%", "25.0%"]


def test_every_peer_has_a_column_and_what_is_unknown_is_empty():
    unknown = dataclasses.replace(
        throughput("static_batch_32", 2.0, 2704), floor_seconds=None, floor_share=None, padded_share=None, steps=None
    )
    (table,) = tables.throughput(FACTS, [throughput("single_stream", 3.342), unknown, throughput("cpu_single", 1.0)])
    by_column = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    assert by_column["vLLM 0.24.0, output tok/s"] == ("153.2", "", "")
    assert by_column["transformers 5.17, output tok/s"] == ("", "1,352", "")
    assert by_column["jaxllm ÷ transformers 5.17"] == ("", "1.00", "")
    assert by_column["floor, s"] == ("1.000", "", "1.000")


def test_online_figures_stand_beside_their_peers():
    compared, every = tables.serve(FACTS, [online(4.0), online(5.0)])
    assert [row[:3] for row in compared.rows] == [
        ["4", "jaxllm", "20.00"],
        ["", "vLLM 0.24.0", "34.60 (0.58×)"],
        ["5", "jaxllm", "20.00"],
    ]
    assert every.rows[0] == ["4", "TTFT", "40.00", "20.00", "50.00", "60.00"]
    assert [row[1] for row in every.rows] == ["TTFT", "TPOT", "ITL", "E2EL"] * 2


def test_the_latest_of_several_results_counts(tmp_path):
    older = dataclasses.replace(FACTS, date="2025-01-01T00:00:00+00:00")
    other = dataclasses.replace(FACTS, device="cpu")
    for name, facts, seconds in (("a", FACTS, 1.0), ("b", older, 2.0), ("c", other, 3.0)):
        save(tmp_path / f"{name}.json", "throughput", facts, [throughput("single_stream", seconds)])
    assert [part.results[0].seconds for part in load_all([tmp_path])] == [1.0, 3.0]


def test_a_page_is_written_with_its_plots(tmp_path):
    target = tmp_path / "docs" / "page.md"
    target.parent.mkdir()
    target.write_text(f"before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n")
    parts = [
        Part("serve", FACTS, [online(4.0), online(12.0)]),
        Part("throughput", FACTS, [throughput("single_stream", 3.0)]),
        Part("ceilings", FACTS, [Ceilings(3e12, 8e14)]),
    ]
    drawn = page.write(target, tmp_path / "docs" / "plots", parts)
    text = target.read_text()
    assert text.startswith("before\n\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert text.index("### Throughput") < text.index("### Online") < text.index("### Ceilings")
    assert "2026-01-02, jaxllm at 0123456+, jax 0.0, driver 1.2, a processor, 2 threads: `jaxllm bench`." in text
    assert len(drawn) == 2
    for path in drawn:
        assert f"](plots/{path.name})" in text and path.read_text().lstrip().startswith("<?xml")
    first = [path.read_bytes() for path in drawn]
    page.write(target, tmp_path / "docs" / "plots", parts)
    assert target.read_text() == text and [path.read_bytes() for path in drawn] == first  # nothing changes by itself
    assert not plot_part(tmp_path / "x.svg", parts[2])


def test_a_page_without_its_marks_is_refused(tmp_path):
    for text in ("", page.BEGIN, f"{page.END} {page.BEGIN}", f"{page.BEGIN} {page.BEGIN} {page.END}"):
        with pytest.raises(ConfigError, match="once each"):
            page.replace(text, "x")


def test_every_kind_of_result_has_its_table():
    for part in KINDS:
        assert isinstance(tables.tables_of(part, FACTS, []), list)
