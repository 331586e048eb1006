"""One process of several that run an engine: `python -m tests.engine.process_of_several JSON FD`, with the options.

Says what it has to say as lines of JSON through FD (Gloo writes to stdout); does what it reads, a word a line.
"""

import json
import os
import sys

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.checkpoint.safetensors_source import SafetensorsCheckpoint
from tests.engine import tiny


def work() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that go in chunks through steps of 8 tokens; of some the first pages are the same."""
    prompts = tiny.prompts(8, 5, longest=14)
    prompts += [prompts[0] + prompts[1], prompts[0] + prompts[2]]
    params = [SamplingParams(temperature=float(i % 2), seed=i, max_tokens=24, ignore_eos=True) for i in range(10)]
    return prompts, params


def outcome(llm: LLM) -> dict:
    """Tokens twice (the second time most prompts are cached), and how they came about."""
    rounds = [llm.generate(*work()) for _ in range(2)]
    stats = llm.stats()
    return {
        "tokens": [[output.outputs[0].token_ids for output in outputs] for outputs in rounds],
        "hits": sum(output.num_cached_tokens for output in rounds[1]),
        "preemptions": stats["preemptions"],
    }


def rare(llm: LLM) -> dict:
    """What goes through the launches that most requests do without."""
    wide = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=-1)
    form = SamplingParams(seed=5, max_tokens=9, structured_outputs=StructuredOutputsParams(regex="([a-c]{3}-)+"))
    mixed = [tiny.mixed_params(i, max_tokens=8) for i in range(24)]
    found = llm.generate([work()[0][3]] * 2, wide) + llm.generate(work()[0][:3], form)
    found += llm.generate(tiny.prompts(24, longest=12), mixed)
    return {
        "tokens": [output.outputs[0].token_ids for output in found],
        "ids": [[list(entry)[:3] for entry in output.outputs[0].logprobs or []] for output in found],
        "embedding": [float(x) for x in llm.embed([work()[0][4]])[0].outputs.embedding],
    }


def recovered(llm: LLM) -> dict:
    """`outcome` while a step of several requests raises in process 0, at the host's."""
    runner = llm._client._core.runner  # type: ignore[attr-defined]
    read = runner.read

    def failing(launched):
        if sum(len(batch.rows) for batch in launched.batches if batch is not None) < 2:
            return read(launched)
        runner.read = read
        raise RuntimeError("once")

    runner.read = failing
    return outcome(llm)


def say(**what) -> None:
    os.write(int(sys.argv[2]), json.dumps(what).encode() + b"\n")


def count_bytes() -> list[int]:
    """Of weights that are read from now on."""
    count, read_into = [0], SafetensorsCheckpoint.read_into

    def counting(self, name, out, index=None):
        count[0] += out.size * self.dtype(name).itemsize
        read_into(self, name, out, index)

    SafetensorsCheckpoint.read_into = counting  # type: ignore[method-assign]
    return count


def main() -> None:
    options = json.loads(sys.argv[1])
    count = count_bytes()
    if options["process_id"] > 0:
        import jaxllm.engine.build as build

        follow = build.follow

        def told(*args):
            say(bytes=count[0])
            follow(*args)

        build.follow = told
    llm = LLM(**options)
    say(bytes=count[0])
    for line in sys.stdin:
        if line.strip() == "outcome":
            say(**outcome(llm))
        elif line.strip() == "rare":
            say(**rare(llm))
        elif line.strip() == "recovered":
            say(**recovered(llm))
        elif line.strip() == "endless":
            say(begun=True)
            while True:
                llm.generate(*work())
    llm.close()


if __name__ == "__main__":
    main()
