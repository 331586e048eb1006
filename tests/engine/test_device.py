"""What goes to the device, and what it gives back to the host."""

import subprocess
import sys

from jaxllm import SamplingParams
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
