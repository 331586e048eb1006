"""What is set before JAX touches a device, and what is left to the user."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from jaxllm.engine import platform
from jaxllm.engine.platform import FRACTION, OLD_FRACTION, configure, memory_fraction


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has made no engine and touched no device."""
    for name in (FRACTION, OLD_FRACTION):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "_set", None)
    monkeypatch.setattr(platform, "_devices_are_in_use", lambda: False)


def fraction() -> float | None:
    """What jaxlib makes of the environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return generate_pjrt_gpu_plugin_options().get("memory_fraction")


def test_an_engine_gets_its_share_and_a_larger_one_after_it_another():
    assert fraction() is None
    configure()
    assert fraction() == memory_fraction(1) == 0.95
    configure(4)
    assert fraction() == memory_fraction(4) == 0.8
    configure(1)
    assert fraction() == 0.95


@pytest.mark.parametrize("name", [FRACTION, OLD_FRACTION])
def test_the_users_share_stays_under_either_name(monkeypatch, name):
    monkeypatch.setenv(name, "0.5")
    before = dict(os.environ)
    configure()
    configure(4)
    assert fraction() == 0.5 and dict(os.environ) == before


def test_both_names_are_left_to_jax_to_refuse(monkeypatch):
    for name in (FRACTION, OLD_FRACTION):
        monkeypatch.setenv(name, "0.5")
    configure()
    with pytest.raises(ValueError, match="together"):
        fraction()


def test_a_share_that_comes_too_late_is_said(monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(platform, "_runs_on_gpus", lambda: True)
    monkeypatch.setattr(platform, "_devices_are_in_use", lambda: True)
    configure()
    (record,) = caplog.records
    assert "0.75 of each GPU's memory" in record.message and f"{FRACTION}=0.95" in record.message
    assert fraction() is None  # it would not hold
    caplog.clear()
    monkeypatch.setenv(OLD_FRACTION, "0.5")  # the user knows
    configure()
    assert not caplog.records
    monkeypatch.delenv(OLD_FRACTION)
    monkeypatch.setattr(platform, "_devices_are_in_use", lambda: False)
    configure(2)
    monkeypatch.setattr(platform, "_devices_are_in_use", lambda: True)
    configure(2)
    assert not caplog.records
    configure(1)
    assert "0.8 of each GPU's memory" in caplog.text and "0.95" in caplog.text
    caplog.clear()
    monkeypatch.setattr(platform, "_runs_on_gpus", lambda: False)
    configure(1)
    assert not caplog.records


def test_the_command_sets_it_before_it_asks_for_devices(root):
    """`generate` and `chat` do so on a thread, before the command line is parsed."""
    code = f"""
import os, sys
import jax
from jaxllm.cli import preload, wait_for_preload

jax.devices = lambda: print(os.environ.get({FRACTION!r}))
sys.modules["jaxllm.engine.build"] = None  # which takes time to import
for words in (["--coordinator-address=a:1"], ["--engine-process"]):
    sys.argv = ["jaxllm", "generate", *words]
    preload()
    wait_for_preload()
print("none yet")
for words in ([], ["-tp", "4"], ["the"], ["--data-parallel-size=2"], ["--", "-tp", "4"]):
    sys.argv = ["jaxllm", "generate", *words]
    preload()
    wait_for_preload()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["none yet", "0.95", "0.8", "0.95", "0.8", "0.95"], done.stderr
