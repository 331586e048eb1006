"""`jaxllm bench calibrate` over a tiny model, and what a short run tells."""

import dataclasses

import pytest
from rich.console import Console

from jaxllm.bench import short_runs
from jaxllm.bench.session import open_session
from jaxllm.bench.short_runs import ShortRun, short_run
from jaxllm.cli import calibrate as command
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.plan import calibrate
from jaxllm.plan.chips import calibration_of, chip, chips, read_calibration
from jaxllm.plan.fit import clock, fit, read_model
from jaxllm.plan.simulate import steps
from tests.bench.conftest import CONFIG
from tests.plan.shapes import model
from tests.plan.test_calibrate import attention

OPTIONS = dict(load_format="dummy", max_num_seqs=4, max_num_batched_tokens=64, token_rungs=(4, 64), page_size=16)


def test_a_short_run_begins_with_its_first_launch(tiny_flags):
    with open_session(tiny_flags[1], OPTIONS, ceilings=False) as session:
        step, launch = session.core.step, session.core.runner.launch
        found = short_run(session, [([5] * 100, 8), ([6] * 40, 3)], rounds=2)
        assert (session.core.step, session.core.runner.launch) == (step, launch)
        assert session.hf == CONFIG and session.vocab_size == CONFIG["vocab_size"]
    assert found.admission_seconds > 0 and 0 < found.host_seconds < found.seconds


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


def test_what_cannot_be_is_refused_first(tiny_flags, tmp_path, monkeypatch):
    """Before a model is looked for."""
    with pytest.raises(ConfigError, match="must be a file in a directory that exists"):
        command.calibrate(tmp_path / "none" / "made.json", model=["nothing"])
    with pytest.raises(ConfigError, match="this device is 'cpu': a calibration is of"):
        command.calibrate(tmp_path / "made.json", model=["nothing"])
    console, kind = Console(), chip("h100").kind
    with pytest.raises(ConfigError, match="tensor_parallel_size=64: there are "):
        command.make(tmp_path / "made.json", ["nothing"], OPTIONS, [1, 64], 1, None, console, kind)
    with pytest.raises(ConfigError, match="runs in float32 here: a calibration is of bfloat16"):
        command.make(tmp_path / "made.json", [tiny_flags[1]], OPTIONS, [1], 1, None, console, kind)
    assert not (tmp_path / "made.json").exists()


@pytest.mark.parametrize("name", chips())
def test_the_sizes_are_ones_that_every_chip_takes(name):
    fitted = fit(
        model("llama-3.1-8b"),
        chip(name),
        EngineConfig(model="any", max_model_len=4096, **command.SIZES),
        data=1,
        tensor=4,
    )
    assert fitted.scheduler.token_rungs == command.SIZES["token_rungs"]
