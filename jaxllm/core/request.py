"""A request as the engine core sees it: tokens, limits, and how far it has come."""

import dataclasses
import enum
from typing import TYPE_CHECKING

from jaxllm.core.prefix import PageNames
from jaxllm.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.core.kv_cache import SequencePages


class Status(enum.IntEnum):
    """WAITING holds no slot and no page; RUNNING holds a slot; the rest are ends."""

    WAITING = 0
    RUNNING = 1
    STOPPED = 2  # a stop token, end-of-sequence or, told from outside, a stop string
    LENGTH = 3  # max_tokens or max_model_len
    ABORTED = 4
    ERROR = 5

    @property
    def ended(self) -> bool:
        return self >= Status.STOPPED


FINISH_REASONS = {Status.STOPPED: "stop", Status.LENGTH: "length", Status.ABORTED: "abort", Status.ERROR: "error"}


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """One sequence. `n` samples are n requests whose followers name the first as `leader`.

    Attributes:
      id: unique among live requests.
      tokens: prompt and known output tokens, one list; grows in `Scheduler.finish`.
      num_prompt_tokens: how many of `tokens` are the prompt. A request may be submitted with output tokens already
        emitted (a resumption): then len(tokens) > num_prompt_tokens, and it goes on exactly as if never interrupted.
      params: the sampler's wishes; `params.max_tokens` is already a number.
      stop_token_ids: every token that ends the request (end-of-sequence included unless ignored).
      seed: 64-bit unsigned; drawn at the door where the user gave none.
      priority: lower runs first under the priority policy.
      arrival: seconds of the clock that `Scheduler.schedule` is given.
      cache_salt: requests of different salts share no pages.
      adapter: the LoRA adapter's name, part of the page hashes; None for the base model.
      leader: the request id whose prompt pages this one waits for and shares.
      pooling: its last hidden row is wanted, not the token sampled from it.
      slot: the row of the device's state that it owns while running, else -1.
      num_computed: tokens whose keys and values are, or by launched steps will be, in the cache.
      num_pending: sampled tokens that launched steps will bring and `finish` has not yet seen.
      num_cached: prompt tokens found in the prefix cache at first admission.
      first_scheduled: when it was first admitted, on the same clock; 0 until then.
      num_preemptions: how often it lost its pages to another request.
      stop_token: the token that stopped it, if one did.
    The scheduler's own:
      limit: prompt and output tokens at which it ends with LENGTH.
      rank: smaller is served first; unique.
      plain: its next token goes out with nothing else to say: it is not the first one and comes without logprobs.
    The cache's own:
      capacity: tokens that its pages have room for.
      commit_at: computed tokens at which its next page is full.
      pages: its page tables.
      names: of its prompt's pages, if they were made at arrival.
    """

    id: str
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    seed: int
    priority: int = 0
    arrival: float = 0.0
    cache_salt: str = ""
    adapter: str | None = None
    leader: str | None = None
    pooling: bool = False
    status: Status = Status.WAITING
    slot: int = -1
    num_computed: int = 0
    num_pending: int = 0
    num_cached: int = 0
    first_scheduled: float = 0.0
    num_preemptions: int = 0
    stop_token: int | None = None
    limit: int = 0
    rank: tuple[int, float, int] = (0, 0.0, 0)
    plain: bool = False
    capacity: int = 0
    commit_at: int = 0
    pages: "SequencePages | None" = None
    names: PageNames | None = None

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens: what `num_computed` has to catch up with."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.tokens) - self.num_prompt_tokens
