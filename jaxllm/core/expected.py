"""What an engine may get ready for before the first request comes."""

import dataclasses

from jaxllm.core.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Expected:
    """The first request, as far as it is known when the engine starts.

    Attributes:
      prompt_length: tokens of its prompt.
      params: its sampling parameters; None expects greedy decoding.
      longest: no request will have more tokens, prompt and output, so that the engine needs no larger cache; None:
        nothing is known. An explicit max_model_len goes before it.
    """

    prompt_length: int = 64
    params: SamplingParams | None = None
    longest: int | None = None
