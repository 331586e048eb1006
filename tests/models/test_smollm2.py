"""The default model's greedy continuations against those of transformers in float32."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint import open_checkpoint
from jaxllm.models.loader import load
from jaxllm.models.registry import model_class
from tests.models.harness import GOLDENS, run

CASES = json.loads((GOLDENS / "smollm2_greedy.json").read_text())


@pytest.fixture(scope="module")
def model():
    checkpoint = open_checkpoint("smollm2")
    cls = model_class(checkpoint.config)
    model = cls(cls.parse_config(checkpoint.config), dtype=jnp.float32)
    load(model, checkpoint)
    return model


def test_goldens():
    assert len(CASES) == 8 and all(len(case["output_ids"]) == 64 for case in CASES)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_greedy_continuations(model, index):
    """Each token is the most likely one after the prompt and the tokens before it, which is what greedy decoding
    yields, found here by one prefill."""
    prompt, output = CASES[index]["prompt_ids"], CASES[index]["output_ids"]
    tokens = np.array(prompt + output[:-1])
    logits = run(model, tokens, [len(tokens)], "xla", rung=128)
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == output
