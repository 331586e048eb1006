"""The scheduler's limits and policy."""

import dataclasses
from typing import Literal

from jaxllm.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler. Raises ConfigError where they do not fit each other.

    Attributes:
      max_num_seqs: slots, that is requests running at once.
      max_num_batched_tokens: the token budget of a step; at least max_num_seqs, so that every slot can decode.
      max_model_len: prompt and output tokens of one request.
      policy: "fcfs" serves by arrival, "priority" by lower `Request.priority`, then arrival.
      token_rungs: the step sizes that are compiled, ascending; the last is the budget. Empty: the budget alone.
      weight_bound_tokens: steps of up to about so many tokens cost the same, since reading the weights bounds them;
        none is cut below it to land on a rung.
      max_waiting_requests: `add` refuses more (None: no limit).
      max_waiting_tokens: `add` refuses when the waiting prompts would hold more, unless nothing waits.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: Literal["fcfs", "priority"] = "fcfs"
    token_rungs: tuple[int, ...] = ()
    weight_bound_tokens: int = 256
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None

    def __post_init__(self) -> None:
        self.token_rungs = tuple(self.token_rungs) or (self.max_num_batched_tokens,)
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs}: must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: "
                f"must be at least max_num_seqs={self.max_num_seqs}"
            )
        if self.max_model_len < 2:
            raise ConfigError(
                f"max_model_len={self.max_model_len}: must be at least 2, one prompt and one output token"
            )
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"policy={self.policy!r}: must be 'fcfs' or 'priority'")
        if list(self.token_rungs) != sorted(set(self.token_rungs)) or self.token_rungs[0] < 1:
            raise ConfigError(f"token_rungs={self.token_rungs}: must be ascending and positive")
        if self.token_rungs[-1] != self.max_num_batched_tokens:
            raise ConfigError(
                f"token_rungs={self.token_rungs}: the last must be max_num_batched_tokens={self.max_num_batched_tokens}"
            )
