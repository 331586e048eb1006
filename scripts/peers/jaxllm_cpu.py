"""jaxllm on the three CPU workloads, one JSON line: run by cpu_table.py."""

import argparse
import time

from common import emit, start_seconds

from jaxllm import LLM, SamplingParams
from jaxllm.bench.workloads import CPU_PREFILL, CPU_SINGLE, cpu_ragged


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    model = parser.parse_args().model
    prompt, new_tokens = CPU_SINGLE
    llm = LLM(model)
    next(llm.stream(prompt, greedy(1)))
    first_token = start_seconds()
    llm.warm_up()

    def seconds(prompts: list[list[int]], counts: list[int]) -> float:
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        llm.generate(prompts, [greedy(count) for count in counts])
        return time.perf_counter() - begin

    requests = cpu_ragged()
    ragged = [prompt for prompt, _ in requests], [count for _, count in requests]
    for work in (([prompt], [4]), ([CPU_PREFILL], [1]), ragged):
        seconds(*work)
    emit(
        engine="jaxllm float32",
        decode=new_tokens / (seconds([prompt], [new_tokens + 1]) - seconds([prompt], [1])),
        prefill=len(CPU_PREFILL) / seconds([CPU_PREFILL], [1]),
        ragged=sum(ragged[1]) / seconds(*ragged),
        first_token=first_token,
    )


if __name__ == "__main__":
    main()
