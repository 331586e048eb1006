"""The front of an engine process needs no JAX: it starts fast and holds little memory."""

import os
import subprocess
import sys

SCRIPT = """
import sys
from jaxllm import LLM, SamplingParams
from tests.engine import tiny
with tiny.llm(sys.argv[1], engine_process=True) as llm:
    params = SamplingParams(n=2, stop=["th"], bad_words=["the"], logprobs=2, max_tokens=4)
    llm.generate("the ring", params)
    llm.stats()
print(*(name for name in ("jax", "jaxlib", "flax") if name in sys.modules))
"""


def test_the_front_of_an_engine_process_imports_no_jax(checkpoint, root):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT, checkpoint("llama")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == ""
