"""How long a step takes on one device of a mesh: at least (the floor), and as calibrated."""

import dataclasses
from collections.abc import Sequence

from jaxllm.bench.floor import ModelCost, Work
from jaxllm.plan.chips import Calibration, Chip


@dataclasses.dataclass(frozen=True)
class Step:
    """One step's work on one data-parallel rank.

    Attributes:
      spans: [start, end) of the tokens of each prompt's part.
      contexts: tokens that each row of one token sees, its own included.
      num_sampled: rows that yield a token.
      num_shared: tokens of all `contexts` that another row reads too, see `ModelCost.decode`.
      num_padded: tokens that products and elementwise work go over; None: as many as there are.
      num_sampled_padded: rows that the sampler goes over; None: `num_sampled`.
    """

    spans: Sequence[tuple[int, int]] = ()
    contexts: Sequence[int] = ()
    num_sampled: int = 0
    num_shared: int = 0
    num_padded: int | None = None
    num_sampled_padded: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.contexts) + sum(end - start for start, end in self.spans)


@dataclasses.dataclass(frozen=True)
class Clock:
    """Times of steps of one model on one device, `tensor` of which hold a rank's weights.

    Attributes:
      whole: what the model costs on one device.
      tensor: tensor shards.
      kv_copies: how often each key and value is stored over the shards: more than once where there are more shards
        than key-value heads.
      hidden_size: of the residual stream, which is summed over the shards twice a layer.
      vocab_size: of the logits.
    """

    chip: Chip
    calibration: Calibration | None
    whole: ModelCost
    tensor: int
    kv_copies: int
    hidden_size: int
    vocab_size: int

    @property
    def cost(self) -> ModelCost:
        """What the model costs on one of the shards."""
        part = self.tensor
        whole = self.whole
        return dataclasses.replace(
            whole,
            layer_weights=whole.layer_weights // part,
            active_weights=whole.active_weights // part,
            tail_weights=whole.tail_weights // part,
            head_weights=whole.head_weights // part,
            expert_weights=whole.expert_weights // part,
            kv_bytes=whole.kv_bytes * self.kv_copies // part,
            attention_flops=whole.attention_flops // part,
        )

    def sums(self, num_tokens: int) -> float:
        """Seconds, at the links' speed, of the two sums of the residual stream's updates in each layer. They are in
        proportion to the tokens, in however many steps these are computed."""
        each = self.chip.all_reduce_seconds(num_tokens * self.hidden_size * self.whole.itemsize, self.tensor)
        return 2 * len(self.whole.windows) * each

    def floor(self, step: Step) -> float:
        """The longer of the step's bytes over the memory's and its FLOPs over the products' published rates, and the
        sums over the shards at the links' rate."""
        cost = self.cost
        work: Work = cost.linear(step.num_tokens, step.num_sampled)
        work += cost.prefill_attention(step.spans) + cost.decode_attention(step.contexts, step.num_shared)
        return self.chip.ceilings.seconds(work) + self.sums(step.num_tokens)

    @property
    def _known(self) -> Calibration | None:
        """The calibration, where it is one of this dtype, and knows of sums over shards if there are some."""
        known = self.calibration
        if known is None or self.whole.itemsize != 2 or (self.tensor > 1 and known.all_reduce_seconds is None):
            return None
        return known

    def predict(self, step: Step) -> float | None:
        """What a step takes by the chip's calibration, which is the longer of the device's part and the host's; None
        without one, in another dtype than it was taken in, or over shards where no sum over them was measured."""
        known = self._known
        return None if known is None else max(self._on_device(step, known), known.host_step_seconds)

    def predict_admission(self, num_prompt_tokens: int) -> float | None:
        """What the host takes for so many tokens of prompts, all there at once, before the first step; None as
        above."""
        known = self._known
        return None if known is None else num_prompt_tokens * known.host_prompt_token_seconds

    def _on_device(self, step: Step, known: Calibration) -> float:
        cost = self.cost
        layers = len(cost.windows)
        tokens = step.num_padded or step.num_tokens
        sampled = step.num_sampled_padded or step.num_sampled
        head = cost.head_weights * cost.itemsize
        read = cost.weight_bytes(tokens) - head  # of experts only those touched, each by its share of the rows
        passed = tokens * (cost.active_weights - cost.tail_weights) + min(sampled, tokens) * cost.tail_weights
        rows = passed * cost.itemsize / read
        seconds = known.gemm_seconds(rows, read) + known.step_seconds + self.sums(tokens)
        each_sum = known.all_reduce_seconds or 0.0
        seconds += layers * (known.layer_seconds + (2 * each_sum if self.tensor > 1 else 0.0))
        seconds += layers * tokens * self.hidden_size * cost.itemsize * known.layer_passes / known.bandwidth
        if sampled:
            logits = sampled * self.vocab_size // self.tensor * 4
            seconds += known.gemm_seconds(sampled, head)
            seconds += known.sampler_seconds + logits * known.sampler_passes / known.bandwidth
        if step.contexts:
            seconds += layers * (known.decode_layer_seconds + len(step.contexts) * known.decode_row_seconds)
            group = cost.attention_flops * cost.itemsize / (2 * cost.kv_bytes)  # query heads a key-value head
            shared = int(step.num_shared * max(0.0, 1 - group / known.decode_tile_rows))
            seconds += cost.decode_attention(step.contexts, shared).bytes / known.decode_bandwidth
        if step.spans:
            queries = sum(end - start for start, end in step.spans)
            extra = queries * known.prefill_extra_keys * cost.attention_flops
            seconds += (cost.prefill_attention(step.spans).flops + extra) / known.prefill_flops
        return seconds
