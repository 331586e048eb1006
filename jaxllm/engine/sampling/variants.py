"""The few compiled variants of the sampler, and which of them a batch needs."""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxllm.core.sampling_params import SamplingParams

MAX_LOGPROBS = 20
"""The width of the list of most likely tokens that `sample` reports; wider ones have an executable of their own."""


@dataclasses.dataclass(frozen=True)
class SamplerVariant:
    """What a compiled sampler can do. Rows that ask for less are served exactly as a smaller variant serves them.

    Attributes:
      random: rows may have a temperature; without it every row is greedy.
      filters: rows may use top_k, top_p and min_p. Implies random.
      adjust: rows may use penalties, logit_bias, allowed_token_ids, bad_words and min_tokens.
      num_logprobs: the width of the list of most likely tokens, or None for no logprobs at all.
      masked: rows may have a grammar's mask.
    """

    random: bool = False
    filters: bool = False
    adjust: bool = False
    num_logprobs: int | None = None
    masked: bool = False

    def serves(self, need: "SamplerVariant") -> bool:
        """Whether a batch that needs `need` may run in this variant."""
        return (
            self.random >= need.random
            and self.filters >= need.filters
            and self.adjust >= need.adjust
            and self.masked >= need.masked
            and (need.num_logprobs is None or (self.num_logprobs or 0) >= need.num_logprobs)
        )

    @property
    def cost(self) -> int:
        """Orders variants by their time, roughly: microseconds a row of 49152 on one CPU core."""
        extras = 200 * self.adjust + 100 * (self.num_logprobs is not None) + 100 * self.masked
        return 30 + 100 * self.random + 300 * self.filters + extras


GREEDY = SamplerVariant()
RANDOM = SamplerVariant(random=True)
FILTERS = SamplerVariant(random=True, filters=True)
MASKED = SamplerVariant(random=True, masked=True)  # a grammar in the batch does not make it filter
MASKED_FILTERS = SamplerVariant(random=True, filters=True, masked=True)
EVERYTHING = SamplerVariant(random=True, filters=True, adjust=True, num_logprobs=MAX_LOGPROBS)
MASKED_EVERYTHING = dataclasses.replace(EVERYTHING, masked=True)

VARIANTS = (GREEDY, RANDOM, MASKED, FILTERS, MASKED_FILTERS, EVERYTHING, MASKED_EVERYTHING)
"""The ladder that is compiled ahead of time; together they serve every batch."""


def is_wide(num_logprobs: int | None) -> bool:
    """Whether a request's `logprobs` exceed the sampler's list, so that `logprobs_of` has to report them."""
    return num_logprobs is not None and not 0 <= num_logprobs <= MAX_LOGPROBS


def variant_for(params: Iterable[SamplingParams]) -> SamplerVariant:
    """The least that a batch of requests needs. Wide logprobs are not the sampler's: see `is_wide`."""
    random = filters = adjust = logprobs = masked = False
    for p in params:
        if p.temperature > 0:
            random = True
            filters |= p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        adjust |= (
            p.presence_penalty != 0
            or p.frequency_penalty != 0
            or p.repetition_penalty != 1
            or bool(p.logit_bias)
            or p.allowed_token_ids is not None
            or bool(p.bad_words)
            or p.min_tokens > 0
        )
        logprobs |= p.logprobs is not None and not is_wide(p.logprobs)
        masked |= p.structured_outputs is not None
    return SamplerVariant(random, filters, adjust, MAX_LOGPROBS if logprobs else None, masked)


def cover(variant: SamplerVariant, available: Sequence[SamplerVariant] = VARIANTS) -> SamplerVariant:
    """The cheapest of `available` that serves `variant`.

    Raises:
      LookupError: none does.
    """
    serving = [candidate for candidate in available if candidate.serves(variant)]
    if not serving:
        raise LookupError(f"no compiled sampler serves {variant}")
    return min(serving, key=lambda candidate: candidate.cost)
