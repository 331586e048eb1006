"""What goes to the device, and what it gives back to the host."""

import subprocess
import sys

from jaxllm import SamplingParams
from jaxllm.core.batch import Batch
from jaxllm.engine.executables import Stage
from tests.engine import tiny

PROGRAM = """
import jax
import jax.numpy as jnp
from jaxllm.engine.device import begin_read
work = jax.jit(lambda a: jax.lax.fori_loop(0, 300, lambda _, b: jnp.tanh(b @ b), a))
array = work(jnp.ones((400, 400))).block_until_ready()
begin_read(work(array))
print("ends", flush=True)
"""


def test_a_program_may_end_before_what_it_launched_is_there(root):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def test_after_a_reset_metadata_travel_again(checkpoint):
    """What the last step had sent is gone with it. A rehearsal runs everything twice, what brings metadata too."""
    with tiny.llm(checkpoint("llama"), **tiny.LEAST) as llm:
        runner = llm._client._core.runner
        device, ran = runner.device, []
        llm.generate([5], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        get = device.executables.get
        device.executables.get = lambda key: ran.append(key) or get(key)
        packed = [device._staged.copy()]
        key = runner._forward_key([_batch_of_one()], all_hidden=False)
        device.forward(key, packed)
        assert Stage() not in ran
        device.reset()
        device.forward(key, packed)
        assert ran.count(Stage()) == 1 and (device._staged == packed[0]).all()
        ran.clear()
        runner.rehearse()
        assert ran.count(Stage()) == 2 == ran.count(key)
        device.reset()


def _batch_of_one() -> Batch:
    return Batch([], [], [[]], 1)


def test_metadata_that_say_nothing_new_stay_on_the_device(checkpoint, monkeypatch):
    """Of 40 decodes those that take a page of 8 tokens, and those after them; another request is another one."""
    with tiny.llm(checkpoint("llama")) as llm:
        device, staged = llm._client._core.runner.device, []
        get = device.executables.get
        monkeypatch.setattr(device.executables, "get", lambda key: staged.append(key) or get(key))
        params = SamplingParams(temperature=0, max_tokens=41, ignore_eos=True)
        for first in (5, 6):
            staged.clear()
            llm.generate([first, 7, 8], params)
            assert staged.count(Stage()) == 1 + 1 + 2 * 5, "the prompt, the first decode, and five pages"
