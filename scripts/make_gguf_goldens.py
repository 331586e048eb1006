#!/usr/bin/env python3
"""Makes tests/checkpoint/goldens/gguf.json: what Transformers reads from the tests' tiny GGUF models.

The tests write those files by the rules of llama.cpp's converter as jaxllm understands them; Transformers undoes the
rules on its own account. Needs transformers with torch and gguf, which jaxllm does not:

    PYTHONPATH=. python scripts/make_gguf_goldens.py
"""

import json
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoint import gguf_files

GOLDEN = Path(__file__).parent.parent / "tests" / "checkpoint" / "goldens" / "gguf.json"
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
)


def main():
    result = {}
    for arch in gguf_files.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as directory:
            tied = arch.startswith("gemma")  # as all of them are; Transformers reads no output.weight for them
            weights = gguf_files.hugging_face_weights(arch, tied=tied)
            gguf_files.write_model(Path(directory) / "model.gguf", arch, weights)
            config = AutoConfig.from_pretrained(directory, gguf_file="model.gguf")
            config.pad_token_id = None  # Phi-3's default lies outside the tiny vocabulary
            if arch == "qwen3":  # for which Transformers does not look at the file's head_dim
                config.head_dim = gguf_files.head_dim(arch)
            model = AutoModelForCausalLM.from_pretrained(
                directory, gguf_file="model.gguf", config=config, dtype="float32"
            )
        tensors = {}
        for name, value in model.state_dict().items():
            if name == "lm_head.weight" and tied:
                continue
            flat = value.double().flatten()
            tensors[name] = {
                "shape": list(value.shape),
                "sum": flat.sum().item(),
                "values": flat[:: len(flat) // 7].tolist(),
            }
        config = {field: getattr(model.config, field) for field in CONFIG_FIELDS if hasattr(model.config, field)}
        result[arch] = {"config": config, "tensors": tensors}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(result, separators=(",", ":")).replace('"model.', '\n"model.') + "\n")


if __name__ == "__main__":
    main()
