"""The least that the activations of a prefill move between a device's memory and its compute units.

`bench/floor.py` counts weights, keys and values alone. A prompt of thousands of tokens also has arrays between its
products that are as large as the weights, and what they must move follows from four rules:

  1. A product reads its operands once and writes its result once. So does attention, whose scores exist a block at a
     time. New keys and values are written to the cache (`bench/floor.py` has that), and a row's are read from there
     once, those of earlier steps and of common prefixes with the new ones: pages know no difference.
  2. Elementwise work is part of a product: norms are scales at its operand; rotary embeddings, activation, residual
     sum and the sum of squares for the next norm are done on its result. So a layer has five arrays: the residual
     stream after either half, queries with keys and values, what was attended to, and the gated half of the MLP, for
     which gate and up meet before either is written.
  3. An array that is written by one product and read by the next crosses memory out and in, unless it stays in memory
     on the chip that XLA keeps whole arrays in (memory space S(1) in its HLO): VMEM on a TPU, CMEM on v4. GPUs have
     none. Nor has v5p for results: its device is two cores with a VMEM each, what one core's half of an instruction
     computes reaches the other through HBM alone, and XLA leaves no product's result in VMEM there. A quarter of it
     belongs to the tiles of weights on their way; an array stays if it fits into the rest together with the residual
     stream, which lives across all of them. Where only one of the two fits, the one whose way out and in is shorter
     goes.
  4. Rows of the embedding are read once. Behind the last layer's attention only sampled rows are needed, and count as
     nothing.

Nothing is counted for the exchange between shards as long as what it sums fits: where it does not, each sum is written
before it and read after it.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.bench.floor import ModelCost, Work

if TYPE_CHECKING:
    from jaxllm.models.config import DecoderConfig

FOR_TILES = 4  # one part in so many of the memory on the chip is for operands that stream through it


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes of each array of a layer on one device.

    Attributes:
      stream: [T, embed], the same on all shards.
      projected: [T, heads and key-value heads], queries, keys and values.
      attended: [T, heads].
      gated: [T, mlp].
      layers: how many.
      shards: over which the layers' sums go.
    """

    stream: int
    projected: int
    attended: int
    gated: int
    layers: int
    shards: int

    @classmethod
    def of(cls, config: "DecoderConfig", num_tokens: int, itemsize: int, shards: int = 1) -> "Activations":
        """Of a step of `num_tokens` tokens, with `itemsize` bytes an element; `config` is that of the whole model."""
        dealt = config.for_shards(shards)
        token = num_tokens * itemsize
        heads = config.num_attention_heads // shards
        kv_heads = config.num_key_value_heads * dealt.kv_copies // shards
        return cls(
            token * config.hidden_size,
            token * (heads + 2 * kv_heads) * config.head_dim,
            token * heads * config.head_dim,
            token * (config.intermediate_size // shards),
            len(config.windows),
            shards,
        )

    def least_bytes(self, on_chip: int) -> int:
        """What they must move. on_chip: bytes in which programs may keep results, 0 where there are none such."""
        room = on_chip - on_chip // FOR_TILES
        attention = self._across(self.projected, room) + self._across(self.attended, room)
        mlp = self._across(self.gated, room)
        # Where the stream does not fit, each half of a layer writes it and reads it as operand and as residual.
        half = 0 if self.stream <= room else 3 * self.stream + (2 * self.stream if self.shards > 1 else 0)
        return self.stream + self.layers * (attention + half) + (self.layers - 1) * (mlp + half)

    def _across(self, array: int, room: int) -> int:
        """Of one array between two products, and of the stream where it has to make room."""
        if self.stream + array <= room:
            return 0
        return 2 * min([size for size in (array, self.stream) if self.stream + array - size <= room] or [array])


def least_prefill(
    cost: ModelCost,
    config: "DecoderConfig",
    spans: Sequence[tuple[int, int]],
    num_sampled: int,
    *,
    shards: int,
    on_chip: int,
) -> Work:
    """`cost.prefill` with what activations and reading the cache must move besides, on one device.

    Args:
      cost: of one device.
      config: of the whole model; dense.
      spans: tokens [start, end) of each prompt.
      on_chip: see `Activations.least_bytes`.
    """
    if cost.num_experts:
        raise ValueError("the activations' least is known of dense models only")
    num_tokens = sum(end - start for start, end in spans)
    arrays = Activations.of(config, num_tokens, cost.itemsize, shards)
    seen = sum(end for _, end in spans) * cost.kv_bytes
    return cost.prefill(spans, num_sampled) + Work(seen + arrays.least_bytes(on_chip))
