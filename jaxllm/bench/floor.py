"""What the hardware allows: bytes and FLOPs that a model's work needs, and the least time that they take.

The floor is that of an engine without overhead, whose memory holds every request at once: all prompts are computed in
one go, common prefixes once, then each step gives every unfinished request a token. A step reads weights once, and the
keys and values of every unfinished request once, those of a common prefix once for all who share it. Each phase takes
the longer of its bytes over the copy bandwidth and its FLOPs over the GEMM rate. Norms, activations and sampling count
as nothing. What follows the last layer's attention is needed for sampled rows alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device reached in this run: `bandwidth` in bytes/s (read and written), `flops` of a GEMM in FLOP/s."""

    bandwidth: float
    flops: float

    def seconds(self, work: "Work") -> float:
        """The least time for some work."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops)


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes moved and FLOPs done (a multiplication with an addition is two)."""

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclasses.dataclass(frozen=True)
class ModelCost:
    """What a decoder costs.

    Attributes:
      layer_weights: weights of all layers' projections, all experts included.
      active_weights: those that one token passes through; `tail_weights`: of these what follows the last layer's
        attention.
      head_weights: weights of the logits' projection.
      num_experts, experts_per_token: 0 and 0 for dense models.
      expert_weights: weights of all experts in all layers.
      kv_bytes: keys and values of one token in all layers.
      attention_flops: FLOPs of one query with one key in all layers, the value's product included.
      windows: each layer's sliding window in tokens, or None.
      itemsize: bytes of a weight.
    """

    layer_weights: int
    active_weights: int
    tail_weights: int
    head_weights: int
    num_experts: int
    experts_per_token: int
    expert_weights: int
    kv_bytes: int
    attention_flops: int
    windows: tuple[int | None, ...]
    itemsize: int

    @classmethod
    def from_config(
        cls, hf: Mapping[str, Any], itemsize: int, windows: Sequence[int | None] | None = None
    ) -> "ModelCost":
        """Of the contents of a config.json, with weights and cache of `itemsize` bytes an element."""
        layers, hidden, heads = hf["num_hidden_layers"], hf["hidden_size"], hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or heads
        head_dim = hf.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
        experts = hf.get("num_experts") or hf.get("num_local_experts") or 0
        per_token = hf.get("num_experts_per_tok") or 0 if experts else 0
        width = hf.get("moe_intermediate_size") or hf["intermediate_size"] if experts else hf["intermediate_size"]
        mlp = 3 * hidden * width
        router = hidden * experts
        return cls(
            layer_weights=layers * (attention + router + mlp * (experts or 1)),
            active_weights=layers * (attention + router + mlp * (per_token or 1)),
            tail_weights=heads * head_dim * hidden + router + mlp * (per_token or 1),
            head_weights=hf["vocab_size"] * hidden,
            num_experts=experts,
            experts_per_token=per_token,
            expert_weights=layers * mlp * experts,
            kv_bytes=2 * layers * kv_heads * head_dim * itemsize,
            attention_flops=4 * layers * heads * head_dim,
            windows=tuple(windows or [None] * layers),
            itemsize=itemsize,
        )

    def weight_bytes(self, num_tokens: int) -> float:
        """Weights that a step of so many tokens reads; of experts those that random routing is expected to touch."""
        weights = self.layer_weights + self.head_weights
        if self.num_experts:
            untouched = (1 - self.experts_per_token / self.num_experts) ** num_tokens
            weights -= int(self.expert_weights * untouched)
        return float(weights * self.itemsize)

    def _pairs(self, contexts: Sequence[int]) -> float:
        """Query-key pairs of queries that see so many tokens each, as a mean over the layers."""
        distinct: dict[int | None, int] = {}
        for window in self.windows:
            distinct[window] = distinct.get(window, 0) + 1
        total = 0.0
        for window, count in distinct.items():
            seen = sum(contexts) if window is None else sum(min(window, context) for context in contexts)
            total += seen * count / len(self.windows)
        return total

    def linear(self, num_tokens: int, num_sampled: int) -> Work:
        """Products with weights: those of all layers for each token but the tail, which with the logits' is for each
        sampled row."""
        body, tail = self.active_weights - self.tail_weights, self.tail_weights + self.head_weights
        flops = 2 * num_tokens * body + 2 * num_sampled * tail
        return Work(self.weight_bytes(num_tokens), flops)

    def prefill_attention(self, spans: Sequence[tuple[int, int]]) -> Work:
        """Attention of tokens [start, end) of each prompt, whose keys and values are written."""
        tokens = sum(end - start for start, end in spans)
        if self.windows == (None,) * len(self.windows):
            pairs = sum((end - start) * (start + 1 + end) / 2 for start, end in spans)
        else:
            pairs = sum(self._pairs(range(start + 1, end + 1)) for start, end in spans)
        return Work(tokens * self.kv_bytes, pairs * self.attention_flops)

    def decode_attention(self, contexts: Sequence[int], num_shared: int = 0) -> Work:
        """Attention of one token a request, which reads its keys and values; see `decode`."""
        pairs = self._pairs(contexts)
        read = pairs - num_shared * self.windows.count(None) / len(self.windows)
        return Work(read * self.kv_bytes, pairs * self.attention_flops)

    def prefill(self, spans: Sequence[tuple[int, int]], num_sampled: int) -> Work:
        """Computing tokens [start, end) of each prompt at once, with the logits of `num_sampled` of them."""
        tokens = sum(end - start for start, end in spans)
        return self.linear(tokens, num_sampled) + self.prefill_attention(spans)

    def decode(self, contexts: Sequence[int], num_shared: int = 0) -> Work:
        """One step of one token for each request.

        contexts: tokens that each sees, its own included; num_shared: how many of all these are another's too and need
        no reading of their own, in layers without a window.
        """
        return self.linear(len(contexts), len(contexts)) + self.decode_attention(contexts, num_shared)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    low, high = 0, length  # first[:low] is common, first[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle
    return low


def phases(cost: ModelCost, requests: Sequence[tuple[list[int], int]]) -> Iterator[Work]:
    """The work of a workload, phase by phase: all prompts, then each decode step."""
    live = _prompts(requests)
    yield cost.prefill([_computed(length, common) for length, common, _ in live], len(requests))
    step = 1
    while live := _unfinished(live, step):
        yield cost.decode([length + step for length, _, _ in live], sum(common for _, common, _ in live))
        step += 1


def num_computed(requests: Sequence[tuple[list[int], int]]) -> int:
    """Tokens that go through the layers in all `phases`: what of prompts is nobody else's, and outputs but the last."""
    total = 0
    for length, common, outputs in _prompts(requests):
        start, end = _computed(length, common)
        total += end - start + outputs - 1
    return total


def _prompts(requests: Sequence[tuple[list[int], int]]) -> list[tuple[int, int, int]]:
    """(tokens, of which the one before has the same, outputs), so that neighbours share the longest prefixes."""
    found: list[tuple[int, int, int]] = []
    previous: list[int] = []
    for prompt, outputs in sorted(requests):
        found.append((len(prompt), common_prefix(previous, prompt), outputs))
        previous = prompt
    return found


def _computed(length: int, common: int) -> tuple[int, int]:
    """[start, end) of the prompt's tokens that are computed: the last one always is."""
    return min(common, length - 1), length


def _unfinished(live: list[tuple[int, int, int]], step: int) -> list[tuple[int, int, int]]:
    """Those with more outputs than `step`, each with what it shares with the one that now stands before it."""
    left: list[tuple[int, int, int]] = []
    shared = 0  # the first has nobody before it
    for length, common, outputs in live:
        shared = min(shared, common)
        if outputs > step:
            left.append((length, shared, outputs))
            shared = length
    return left


@dataclasses.dataclass(frozen=True)
class Floor:
    """A workload's least work, and its least time in seconds if the device's ceilings are known."""

    work: Work
    seconds: float | None


def floor_of(cost: ModelCost, requests: Sequence[tuple[list[int], int]], ceilings: Ceilings | None = None) -> Floor:
    """The floor of a workload."""
    work, seconds = Work(), 0.0
    for phase in phases(cost, requests):
        work += phase
        if ceilings is not None:
            seconds += ceilings.seconds(phase)
    return Floor(work, None if ceilings is None else seconds)
