#!/usr/bin/env python
"""What requests under a grammar cost their neighbours: tokens/s of the free half of a batch, while the other half is
under a grammar and while it is not.

    python scripts/bench_structured.py smollm2 --requests 64 --tokens 64 --rounds 5

The engine runs in a process of its own. In each round both cases come one after the other, in turn first, so that what
else the machine does falls on both; every request makes the same number of tokens, all at once. The speed of a case is
the median of its free requests' tokens over the time from the first to the last of them. The bar: the median over the
rounds of grammar over none is at least 0.97. Status 1 below it. The engine's processor time is printed too, which other
work on the machine changes less; on a CPU that is the device as well, masks included, on an accelerator the host alone.
"""

import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm import AsyncLLM, SamplingParams, StructuredOutputsParams

BAR = 0.97
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "born": {"type": "string", "format": "date"},
        "kind": {"enum": ["person", "company", "club"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
    },
    "required": ["name", "age", "mail", "born", "kind", "tags"],
    "additionalProperties": False,
}
FORM = StructuredOutputsParams(json={"type": "array", "items": RECORD, "minItems": 10_000})  # never ends


async def one(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> tuple[float, float]:
    """When its first and its last token came."""
    moments: list[float] = []
    async for delta in llm.generate({"prompt_token_ids": prompt}, params):
        assert delta.finish_reason != "error", delta.error
        moments.append(time.perf_counter())
    return moments[0], moments[-1]


async def speed(llm: AsyncLLM, requests: int, tokens: int, formed: bool, seed: int) -> tuple[float, float]:
    """Tokens/s of a free request while all others run, and the engine's seconds of processor time."""
    before = processor_seconds(llm)
    work = []
    for index in range(requests):
        under = formed and index % 2 == 1
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, seed=seed + index, structured_outputs=FORM if under else None
        )
        work.append(one(llm, [11 + (7 * index + at) % 200 for at in range(16)], params))
    free = (await asyncio.gather(*work))[::2]
    median = statistics.median((tokens - 1) / (last - first) for first, last in free)
    return median, processor_seconds(llm) - before


def processor_seconds(llm: AsyncLLM) -> float:
    """What the engine's process has used so far."""
    client: Any = llm._client
    fields = Path(f"/proc/{client._core.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(
    model: Annotated[str, typer.Argument(help="name or path")] = "smollm2",
    requests: Annotated[int, typer.Option(help="at once; every other one is under a grammar")] = 64,
    tokens: Annotated[int, typer.Option(help="of each")] = 64,
    rounds: Annotated[int, typer.Option(help="of both cases")] = 5,
) -> None:
    """Measures and prints; status 1 below the bar."""

    async def measure() -> list[float]:
        options: dict[str, Any] = {"max_num_seqs": requests, "max_model_len": 32 + tokens, "warm_up": False}
        async with AsyncLLM(model, **options) as llm:
            for formed in (False, True, False, True):  # all that they need is compiled, the vocabulary read
                await speed(llm, requests, tokens, formed, 0)
            before = (await llm.stats())["late_compilations"]
            ratios, work = [], []
            for at in range(rounds):
                order = (False, True) if at % 2 else (True, False)
                found = {formed: await speed(llm, requests, tokens, formed, 1000 * at) for formed in order}
                (plain, plain_work), (beside, beside_work) = found[False], found[True]
                ratios.append(beside / plain)
                work.append(plain_work / beside_work)
                print(
                    f"round {at + 1}: {plain:.2f} tokens/s each, beside {requests // 2} under a grammar {beside:.2f}, "
                    f"{100 * ratios[-1]:.1f} %; processor time {plain_work:.1f} s and {beside_work:.1f} s, "
                    f"{100 * work[-1]:.1f} %; load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
            assert (await llm.stats())["late_compilations"] == before, "the measurement has compiled"
            print(f"processor time without over with grammars: median {100 * statistics.median(work):.1f} %")
            return ratios

    median = statistics.median(asyncio.run(measure()))
    print(f"median {100 * median:.1f} % (bar {100 * BAR:.0f} %)")
    raise SystemExit(median < BAR)


if __name__ == "__main__":
    typer.run(main)
