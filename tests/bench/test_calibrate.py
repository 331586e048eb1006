"""`jaxllm bench calibrate` over a tiny model, and what a short run tells."""

import dataclasses

import pytest
from rich.console import Console

from jaxllm.bench import short_runs
from jaxllm.bench.session import open_session
from jaxllm.bench.short_runs import ShortRun, short_run
from jaxllm.cli import calibrate as command
from jaxllm.plan import calibrate
from jaxllm.plan.chips import calibration_of, chip, read_calibration
from jaxllm.plan.fit import clock, read_model
from jaxllm.plan.simulate import steps
from tests.bench.conftest import CONFIG
from tests.plan.test_calibrate import attention

OPTIONS = dict(load_format="dummy", max_num_seqs=4, max_num_batched_tokens=64, token_rungs=(4, 64), page_size=16)


def test_a_short_run_begins_with_its_first_launch(tiny_flags):
    with open_session(tiny_flags[1], OPTIONS, ceilings=False) as session:
        launch = session.core.runner.launch
        found = short_run(session, [([5] * 100, 8), ([6] * 40, 3)], rounds=2)
        assert session.core.runner.launch == launch
        assert session.hf == CONFIG and session.vocab_size == CONFIG["vocab_size"]
    assert found.admission_seconds > 0 and 0 < found.host_seconds < found.seconds + found.admission_seconds


def test_a_calibration_is_made_and_written(tiny_flags, tmp_path, monkeypatch, capsys):
    """The times are those of another calibration: what so small a model takes on a CPU says nothing."""
    h100 = chip("h100")
    truth = dataclasses.replace(calibration_of(h100), host_step_seconds=0.0)
    times, ran = clock(read_model("tiny", CONFIG, "bfloat16"), h100, truth, 1), []

    def pretend(session, requests, rounds):
        plan = session.core.runner.plan
        made = list(steps(requests, plan.scheduler, plan.groups, plan.decode_rungs))
        ran.append((rounds, made))
        return ShortRun(sum(map(times.predict, made)), 1e-6, 0.0)

    monkeypatch.setattr(short_runs, "short_run", pretend)
    monkeypatch.setattr(command, "_attention", lambda *_: attention())
    monkeypatch.setattr(calibrate, "RUNS", ((1, 8, 24), (4, 8, 24), (4, 64, 16), (1, 200, 16), (4, 100, 1)))
    output, options = tmp_path / "made.json", {**OPTIONS, "dtype": "bfloat16"}
    command.make(output, [tiny_flags[1]], options, [1], 3, "abc1234", Console(width=200), h100.kind)
    found = read_calibration(output)
    assert found.chip == "h100" and found.all_reduce_seconds is None and len(ran) == 5
    assert "jaxllm at abc1234" in found.sources[0] and found.sources[1].startswith("bandwidth: a copy")
    assert "10 times of attention and 5 runs" in found.sources[2]
    again = dataclasses.replace(times, calibration=found)
    for rounds, made in ran:
        assert rounds == 3
        assert sum(map(again.predict, made)) == pytest.approx(sum(map(times.predict, made)), rel=0.02)
    assert "4 × 64 + 16: " in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path):
    from jaxllm.errors import ConfigError

    with pytest.raises(ConfigError, match="must be a file in a directory that exists"):
        command.calibrate(tmp_path / "none" / "made.json", model=["nothing"])
