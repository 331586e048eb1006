"""transformers' generate on static batches, random bfloat16 weights on a GPU, as rows of jaxllm/bench/peers.json.

Run in an environment with torch and transformers: `python scripts/peers/transformers_gpu.py llama-3.1-8b --output F`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from common import workloads
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    work = workloads()
    parser.add_argument("model", choices=list(work.MODEL_SHAPES))
    parser.add_argument("--runs", type=int, default=3, help="of which the fastest counts, after one that does not")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    shape = dict(work.MODEL_SHAPES[given.model])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.do_sample = None, 0, False
    rows = []
    for name, requests in work.STATIC_WORKLOADS.items():
        batch = requests(shape["vocab_size"])
        ids = torch.tensor([prompt for prompt, _ in batch], device="cuda")
        count, seconds = batch[0][1], []
        for _ in range(given.runs + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count
                )
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            assert out.shape[1] == ids.shape[1] + count
        best = min(seconds[1:])
        rows.append(
            {
                "engine": f"transformers {transformers.__version__}",
                "device": torch.cuda.get_device_name(0),
                "devices": 1,
                "model": given.model,
                "workload": name,
                "seconds": round(best, 3),
                "output_tok_s": round(len(batch) * count / best, 1),
                "total_tok_s": round(len(batch) * (ids.shape[1] + count) / best, 1),
                "runs": [round(each, 3) for each in seconds[1:]],
            }
        )
        given.output.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
