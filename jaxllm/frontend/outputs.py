"""What users get back, under vLLM's names."""

import dataclasses


@dataclasses.dataclass(slots=True)
class Logprob:
    """One token's log-probability under the raw logits.

    Attributes:
      logprob: natural logarithm.
      rank: 1 for the most likely token.
      decoded_token: its text; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
      index: which of the n samples.
      text: the text so far (in a stream of deltas: what is new).
      token_ids: the tokens so far (in a stream of deltas: the new ones).
      cumulative_logprob: sum over `logprobs`, if asked for.
      logprobs: for each token a dict from token id to Logprob: the token itself and the most likely ones.
      finish_reason: "stop", "length", "abort" or "error"; None while it runs.
      stop_reason: the stop string or stop token id that ended it; None for end-of-sequence.
      error: with finish_reason "error", what went wrong.
      prompt_logprobs: in a stream of deltas the prompt's, with the first one; else see `RequestOutput`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A request and its samples.

    Attributes:
      request_id: as given or drawn.
      prompt: the text, None if token ids came in.
      prompt_token_ids: what the model saw.
      prompt_logprobs: None for the first position, then as in `CompletionOutput.logprobs`, if asked for.
      outputs: the n samples, by index.
      finished: all of them have ended.
      num_cached_tokens: prompt tokens found in the prefix cache.
      queue_time: seconds from the request's arrival to its first step, of the first sample; None until its first token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    queue_time: float | None = None


@dataclasses.dataclass(slots=True)
class EmbeddingOutput:
    """embedding: as many floats as the model has hidden dimensions."""

    embedding: list[float]


@dataclasses.dataclass(slots=True)
class EmbeddingRequestOutput:
    """A prompt's embedding.

    Attributes:
      request_id: as given or drawn.
      outputs: the embedding; one, though vLLM's name is a plural.
      prompt_token_ids: what the model saw.
      num_cached_tokens: prompt tokens found in the prefix cache.
      queue_time: as in `RequestOutput`.
    """

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    queue_time: float | None = None
