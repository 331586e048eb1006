"""`jaxllm bench all`, part parity: the attention kernel's tokens and logprobs beside the reference path's.

An engine on the default backend generates greedily; then an engine on the reference backend reads each prompt with its
answer at once and says what it thinks of every token. Both compute in the run's dtype, so the two round differently:
what must hold is that their logprobs agree within `TOLERANCE`, and that the kernel never chose a token that the
reference puts further than that below its best.
"""

import dataclasses
import gc
import random
from typing import Any

from jaxllm.bench.models import bench_model
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.llm import LLM

TOLERANCE = 2e-2  # of a logprob's size: bfloat16 keeps 8 bits, and dozens of layers round
LENGTHS = (1, 2, 17, 63, 64, 65, 130, 257, 400)  # of prompts, in tokens: around pages, tiles and chunks
OUTPUT = 48


@dataclasses.dataclass
class ParityResult:
    """One comparison.

    Attributes:
      backend: of the tokens; `reference` of what is compared with.
      num_tokens: generated and compared.
      num_other: tokens that are not the reference's most likely one.
      worst_logprob: largest |logprob - reference's| / max(|reference's|, 1).
      worst_gap: largest (reference's best - reference's logprob of the token) / max(|best|, 1); 0 where all are its
        best.
      agrees: whether both are within the tolerance.
    """

    backend: str
    reference: str
    num_tokens: int
    num_other: int
    worst_logprob: float
    worst_gap: float
    tolerance: float
    agrees: bool


def prompts(vocab_size: int) -> list[list[int]]:
    """Two of each length; the second begins with the first's half, for the prefix cache."""
    rng = random.Random(0)
    made = []
    for length in LENGTHS:
        first = [rng.randrange(10, vocab_size - 10) for _ in range(length)]
        made += [
            first,
            first[: length // 2] + [rng.randrange(10, vocab_size - 10) for _ in range(length - length // 2)],
        ]
    return made


def measure_parity(model: str, options: dict[str, Any], output_tokens: int = OUTPUT) -> ParityResult:
    """Opens two engines, one after the other; `options` are those of `LLM`. Raises what it raises."""
    longest = max(LENGTHS) + output_tokens + 1
    options = {**options, "max_model_len": longest, "max_num_seqs": 2 * len(LENGTHS), "warm_up": False}
    greedy = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False, logprobs=1)
    scored = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=1)
    with bench_model(model, options) as (path, made):
        made["max_model_len"] = longest
        with LLM(path, **made) as llm:
            backend = llm._client._core.runner.plan.backend  # type: ignore[attr-defined]
            asked = prompts(llm._builder.limits.vocab_size)
            answers = [answer.outputs[0] for answer in llm.generate(asked, greedy)]
        del llm
        gc.collect()  # two caches do not fit
        with LLM(path, **made | {"attention_backend": "reference"}) as llm:
            read = llm.generate([p + a.token_ids for p, a in zip(asked, answers, strict=True)], scored)
    others, worst_logprob, worst_gap = 0, 0.0, 0.0
    for prompt, answer, scores in zip(asked, answers, read, strict=True):
        assert answer.logprobs is not None and scores.prompt_logprobs is not None
        for index, token in enumerate(answer.token_ids):
            ours, theirs = answer.logprobs[index][token].logprob, scores.prompt_logprobs[len(prompt) + index]
            assert theirs is not None
            best = max(entry.logprob for entry in theirs.values())
            theirs_of_it = theirs[token].logprob
            others += theirs_of_it < best
            worst_logprob = max(worst_logprob, abs(ours - theirs_of_it) / max(abs(theirs_of_it), 1.0))
            worst_gap = max(worst_gap, (best - theirs_of_it) / max(abs(best), 1.0))
    total = sum(len(answer.token_ids) for answer in answers)
    agrees = max(worst_logprob, worst_gap) <= TOLERANCE
    return ParityResult(backend, "reference", total, others, worst_logprob, worst_gap, TOLERANCE, agrees)
