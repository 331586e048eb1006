"""What the device gives back to the host."""

import subprocess
import sys

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
