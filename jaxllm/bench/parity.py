"""`jaxllm bench all`, part parity: the attention kernel's tokens and logits beside the reference path's.

An engine on the default backend generates greedily, and the logits of each token are kept. Then engines on the
reference backend read each prompt with its answer at once, and the logits that predict each token are kept: one in the
run's dtype, and where that is not float32 another one in float32, which shows what rounding alone does to the reference
path: random weights of dozens of layers enlarge it. The kernel's logits must agree with the reference path's, all of
them together within `TOLERANCE`, or within what two such roundings differ by, those of each position within that and
what two roundings of the reference there do; and where an answer parts from the one that the reference path would give,
both tokens must tie within the first. What comes after that token is another text, which the reference path
would not write; its logits are compared, its choices only counted.
"""

import dataclasses
import gc
import random
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.bench.kept_logits import Logits, kept_logits
from jaxllm.bench.models import bench_model
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.errors import OutOfMemoryError
from jaxllm.llm import LLM

TOLERANCE = 2e-2  # of the logits' size: bfloat16 keeps 8 bits
TINY = 1e-6  # a size to be relative to, where all logits are zero
LENGTHS = (1, 2, 17, 63, 64, 65, 130, 257, 400)  # of prompts, in tokens: around pages, tiles and chunks
OUTPUT = 48


@dataclasses.dataclass
class ParityResult:
    """One comparison. An error is that of one position: the norm of the difference of all logits over the norm of the
    reference's.

    Attributes:
      backend: of the tokens; `reference` of what is compared with.
      num_tokens: generated and compared.
      num_other: tokens that are not the reference's most likely one.
      worst_error, mean_error: of the backend beside the reference, both in the run's dtype.
      worst_gap: largest (reference's best - reference's logit of the token) / |best|, over all positions; 0 where all
        are its best.
      num_parted: answers with a token that is not the reference's most likely one, out of `num_answers`.
      worst_parting: largest gap of an answer's first such token.
      rounding_worst, rounding_mean: errors of the reference in the run's dtype beside itself in float32; 0 where they
        are the same. None: float32 did not fit.
      backend_mean: mean error of the backend beside the reference in float32; None likewise.
      tolerance: what `whole_error` and `worst_parting` may be: TOLERANCE, or twice `whole_rounding` if that is more; of
        logprobs, what `worst_error` and `worst_parting` might: TOLERANCE or twice `rounding_worst`.
      agrees: whether both are within it, and no position is outside.
      compared: "logits"; results of before they were kept: "logprobs", of the 20 most likely tokens.
      whole_error: of the backend beside the reference, over all positions at once; `whole_rounding` likewise of the
        reference beside itself in float32. None where logprobs were compared, or float32 did not fit.
      num_outside: positions whose error is more than TOLERANCE and twice the rounding there or on average.
      worst_largest: the worst of the positions' largest difference of a logit over the reference's largest logit; None
        where logprobs were compared.
    """

    backend: str
    reference: str
    num_tokens: int
    num_other: int
    worst_error: float
    mean_error: float
    worst_gap: float
    num_answers: int
    num_parted: int
    worst_parting: float
    rounding_worst: float | None
    rounding_mean: float | None
    backend_mean: float | None
    tolerance: float
    agrees: bool
    compared: str = "logprobs"
    whole_error: float | None = None
    whole_rounding: float | None = None
    num_outside: int = 0
    worst_largest: float | None = None


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


def errors(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
    """Of each position's logits [V]: the norm of the difference over that of what is expected."""
    return [float(np.linalg.norm(a - b) / max(np.linalg.norm(b), TINY)) for a, b in zip(found, expected, strict=True)]


def whole_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Of all positions at once, so that those with small logits count little."""
    squares = [(np.sum((a - b) ** 2), np.sum(b**2)) for a, b in zip(found, expected, strict=True)]
    size = max(float(sum(size for _, size in squares)), TINY**2)
    return float(np.sqrt(sum(of_difference for of_difference, _ in squares) / size))


def largest_errors(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[float]:
    """Of each position: the largest difference over the largest of what is expected."""
    return [float(np.abs(a - b).max() / max(np.abs(b).max(), TINY)) for a, b in zip(found, expected, strict=True)]


def gap(logits: np.ndarray, token: int) -> float:
    """How far `token` is below the best, relative to the best's size."""
    best = logits.max()
    return float((best - logits[token]) / max(abs(best), TINY))


def partings(gaps: Sequence[Sequence[float]]) -> list[float]:
    """Of each answer that parts from the reference's: the gap of the first token that does. `gaps`: of its tokens."""
    return [next(each for each in answer if each > 0) for answer in gaps if any(answer)]


def measure_parity(model: str, options: dict[str, Any], output_tokens: int = OUTPUT) -> ParityResult:
    """Opens two or three engines, one after the other; `options` are those of `LLM`. Raises what it raises."""
    longest = max(LENGTHS) + output_tokens + 1
    options = {**options, "max_model_len": longest, "max_num_seqs": 2 * len(LENGTHS), "warm_up": False}
    greedy = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    with bench_model(model, options) as (path, made):
        made["max_model_len"] = longest
        with LLM(path, **made) as llm, kept_logits(llm) as kept:
            plan = llm._client._core.runner.plan  # type: ignore[attr-defined]
            asked = prompts(llm._builder.limits.vocab_size)
            tokens = [answer.outputs[0].token_ids for answer in llm.generate(asked, greedy)]
            ours = _in_order(kept, asked, tokens, asked)
        del llm, kept
        gc.collect()  # two caches do not fit
        made["attention_backend"] = "reference"
        theirs = _read(path, made, asked, tokens)
        whole: list[np.ndarray] | None = theirs
        if plan.dtype.name != "float32":
            whole = _read_in_float32(path, made, asked, tokens)
    each = iter(theirs)
    gaps = [[gap(next(each), token) for token in answer] for answer in tokens]
    parted = partings(gaps)
    found = errors(ours, theirs)
    rounding, beside = (None, None) if whole is None else (errors(theirs, whole), errors(ours, whole))
    mean = sum(rounding) / len(rounding) if rounding else 0.0
    each_rounding = rounding or [0.0] * len(found)
    # Not "more than": what is not a number is outside, too.
    inside = [error <= TOLERANCE + 2 * max(mean, own) for error, own in zip(found, each_rounding, strict=True)]
    of_all, rounding_of_all = whole_error(ours, theirs), None if whole is None else whole_error(theirs, whole)
    tolerance = max(TOLERANCE, 2 * (rounding_of_all or 0.0))
    return ParityResult(
        backend=plan.backend,
        reference="reference",
        num_tokens=len(theirs),
        num_other=sum(each > 0 for answer in gaps for each in answer),
        worst_error=max(found),
        mean_error=sum(found) / len(found),
        worst_gap=max(map(max, gaps)),
        num_answers=len(gaps),
        num_parted=len(parted),
        worst_parting=max(parted, default=0.0),
        rounding_worst=max(rounding) if rounding else None,
        rounding_mean=sum(rounding) / len(rounding) if rounding else None,
        backend_mean=sum(beside) / len(beside) if beside else None,
        tolerance=tolerance,
        agrees=all(inside) and all(error <= tolerance for error in (of_all, *parted)),
        compared="logits",
        whole_error=of_all,
        whole_rounding=rounding_of_all,
        num_outside=inside.count(False),
        worst_largest=max(largest_errors(ours, theirs)),
    )


def _in_order(
    kept: Logits, asked: Sequence[Sequence[int]], answered: Sequence[Sequence[int]], read: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Of each answered token the logits that predict it, kept under the prompts in `read`."""
    return [
        kept[tuple(prompt), len(asked[index]) + at]
        for index, prompt in enumerate(read)
        for at in range(len(answered[index]))
    ]


def _read_in_float32(path: str, options: dict[str, Any], asked: Any, answered: Any) -> list[np.ndarray] | None:
    """None where it does not fit."""
    usual = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU's default is less: TF32
    try:
        return _read(path, options | {"dtype": "float32"}, asked, answered)
    except OutOfMemoryError:
        return None
    finally:
        jax.config.update("jax_default_matmul_precision", usual)


def _read(
    path: str, options: dict[str, Any], asked: Sequence[Sequence[int]], answered: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The logits with which an engine predicts each answered token."""
    scored = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, prompt_logprobs=0)
    joined = [[*prompt, *answer] for prompt, answer in zip(asked, answered, strict=True)]
    with LLM(path, **options) as llm, kept_logits(llm) as kept:
        llm.generate(joined, scored)
        found = _in_order(kept, asked, answered, joined)
    del llm, kept
    gc.collect()
    return found
