"""What a request for an embedding may ask, under vLLM's names."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How a prompt becomes one vector: its last token's hidden row after the final norm, as vLLM pools decoder models.

    Attributes:
      normalize: divide it by its Euclidean length.
    """

    normalize: bool = True
