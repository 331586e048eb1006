"""Beam search over `LLM.generate`, with vLLM's names and meaning.

Each step asks for one token of every beam of every prompt at once, with its most likely tokens; the prefix cache makes
all but a beam's last page free. The engine itself knows nothing of beams.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.frontend.outputs import Logprob

if TYPE_CHECKING:
    from jaxllm.llm import LLM

MAX_LENGTH_PENALTY = 10


@dataclasses.dataclass(kw_only=True)
class BeamSearchParams:
    """What to search for. Raises InvalidRequestError.

    Attributes:
      beam_width: sequences kept after each step, and returned for each prompt; each step looks at twice as many tokens
        of each.
      max_tokens: the most output tokens.
      ignore_eos: go on past the end-of-sequence token, and let it count as any other.
      temperature: accepted for vLLM's sake. Beams are ranked by the log-probabilities of the raw logits.
      length_penalty: sequences are ranked by cum_logprob / length**length_penalty, the prompt and no end-of-sequence
        token counting as length; below 1 favours short ones. In [-10, 10].
      include_stop_str_in_output: keep the end-of-sequence token in `tokens`.
      structured_outputs: refused: a beam search cannot be put under a grammar.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidRequestError(name, value, "must be an integer of at least 1")
        if self.structured_outputs is not None:
            raise InvalidRequestError("structured_outputs", self.structured_outputs, "goes with no beam search")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "must be True or False")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InvalidRequestError("temperature", self.temperature, "must be finite and at least 0")
        most = MAX_LENGTH_PENALTY
        if not _is_number(self.length_penalty) or not -most <= self.length_penalty <= most:
            raise InvalidRequestError("length_penalty", self.length_penalty, f"must be in [-{most}, {most}]")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass
class BeamSearchSequence:
    """One beam.

    Attributes:
      tokens: the prompt's and the beam's token ids.
      logprobs: for each new token, what `generate` reports for logprobs=2 * beam_width.
      cum_logprob: sum of the new tokens' log-probabilities, the end-of-sequence token's included.
      text: of all tokens; None for a model without a tokenizer.
      finish_reason: "stop" after an end-of-sequence token, else "length".
      stop_reason: the end-of-sequence token's id.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclasses.dataclass
class BeamSearchOutput:
    """The best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


class _Search:
    """The beams of one prompt."""

    def __init__(self, prompt: list[int], params: BeamSearchParams, eos_token_ids: Collection[int]):
        self._params, self._eos = params, eos_token_ids
        self.live = [BeamSearchSequence(prompt)]
        self._ended: list[BeamSearchSequence] = []

    def _score(self, beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in self._eos)
        return beam.cum_logprob / max(length, 1) ** self._params.length_penalty

    def _best(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(beams, key=self._score, reverse=True)[: self._params.beam_width]

    def advance(self, found: Sequence[dict[int, Logprob]]) -> None:
        """Takes the next token's log-probabilities of each live beam in."""
        grown: list[BeamSearchSequence] = []
        for beam, logprobs in zip(self.live, found, strict=True):
            for token, entry in logprobs.items():
                if entry.rank is not None and entry.rank > 2 * self._params.beam_width:
                    continue  # the token that was drawn stands there however unlikely it is
                ends = token in self._eos and not self._params.ignore_eos
                kept = not ends or self._params.include_stop_str_in_output
                new = BeamSearchSequence(
                    tokens=[*beam.tokens, token] if kept else beam.tokens,
                    logprobs=[*beam.logprobs, logprobs],
                    cum_logprob=beam.cum_logprob + entry.logprob,
                )
                if ends:
                    new.finish_reason, new.stop_reason = "stop", token
                    self._ended.append(new)
                else:
                    grown.append(new)
        self.live = self._best(grown)

    def result(self) -> list[BeamSearchSequence]:
        """The best of those that ended and those that ran out of tokens."""
        for beam in self.live:
            beam.finish_reason = "length"
        return self._best(self._ended + self.live)


def beam_search(llm: "LLM", prompts: Sequence[Any], params: BeamSearchParams) -> list[BeamSearchOutput]:
    """The `beam_width` best continuations of each prompt, as `LLM.beam_search` of vLLM finds them.

    Args:
      prompts: text, token ids, or a mapping with "prompt" or "prompt_token_ids".

    Raises:
      InvalidRequestError: no BeamSearchParams, a prompt that cannot be, or one that leaves no room for max_tokens.
    """
    if not isinstance(params, BeamSearchParams):
        raise InvalidRequestError("params", params, "must be BeamSearchParams")
    searches = []
    for prompt in prompts:
        text, ids = llm.token_ids(prompt)
        room = llm.max_model_len - len(ids)
        if params.max_tokens > room:
            limit = f"at most {room} after {len(ids)} prompt tokens (max_model_len={llm.max_model_len})"
            raise InvalidRequestError("max_tokens", params.max_tokens, limit)
        searches.append(_Search(ids, params, llm.eos_token_ids))
    one = SamplingParams(
        max_tokens=1,
        logprobs=2 * params.beam_width,
        temperature=params.temperature,
        ignore_eos=True,
        detokenize=False,
    )
    for _ in range(params.max_tokens):
        beams = [beam.tokens for search in searches for beam in search.live]
        if not beams:
            break
        outputs = iter(llm.generate(beams, one))
        for search in searches:
            search.advance([_logprobs(next(outputs)) for _ in search.live])
    results = [BeamSearchOutput(search.result()) for search in searches]
    if llm.has_tokenizer:
        tokenizer = llm.get_tokenizer()
        for result in results:
            for sequence in result.sequences:
                sequence.text = tokenizer.decode(sequence.tokens)
    return results


def _logprobs(output: Any) -> dict[int, Logprob]:
    sample = output.outputs[0]
    if not sample.logprobs:
        raise RuntimeError(f"a beam ended without a token (finish_reason={sample.finish_reason})")
    return sample.logprobs[0]
