"""A model small enough to measure in a second."""

import json

import pytest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
FLAGS = [
    "--load-format",
    "dummy",
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "64",
    "--token-rungs",
    "4,64",
    "--page-size",
    "16",
]


@pytest.fixture(scope="session")
def tiny_flags(tmp_path_factory) -> list[str]:
    """Command-line flags that name a tiny model with random weights and small sizes."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return ["--model", str(directory), *FLAGS]
