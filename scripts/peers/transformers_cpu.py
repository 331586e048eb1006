"""transformers on the three CPU workloads, static batch, one JSON line. Run by cpu_table.py in an environment with
torch, transformers, gguf and accelerate."""

import argparse
import time
from pathlib import Path

import torch
from common import emit, start_seconds, workloads
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(
        str(options.gguf.parent), gguf_file=options.gguf.name, dtype=getattr(torch, options.dtype)
    ).eval()
    config = model.generation_config
    config.eos_token_id, config.pad_token_id = None, 0
    config.do_sample, config.temperature, config.top_p = False, None, None

    def seconds(prompts: list[list[int]], new_tokens: int) -> float:
        """A static batch, padded on the left, until its longest answer is done."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return time.perf_counter() - begin

    work = workloads()
    prompt, new_tokens = work.CPU_SINGLE
    requests = work.cpu_ragged()
    seconds([prompt], 1)
    first_token = start_seconds()
    seconds([prompt], 4)
    emit(
        engine=f"transformers {options.dtype}",
        decode=new_tokens / (seconds([prompt], new_tokens + 1) - seconds([prompt], 1)),
        prefill=len(work.CPU_PREFILL) / seconds([work.CPU_PREFILL], 1),
        ragged=sum(n for _, n in requests) / seconds([p for p, _ in requests], max(n for _, n in requests)),
        first_token=first_token,
    )


if __name__ == "__main__":
    main()
