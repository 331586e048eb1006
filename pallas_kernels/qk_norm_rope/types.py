"""What the backends take beside arrays."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Heads:
    """How a row of the fused projection is divided: `queries` heads, then `keys` of keys and as many of values, each of
    `dim`; and how queries and keys are normalized, where they are (see `add_rms_norm`)."""

    queries: int
    keys: int
    dim: int
    eps: float = 0.0
    unit_offset: bool = False

    @property
    def width(self) -> int:
        """Of a row."""
        return (self.queries + 2 * self.keys) * self.dim
