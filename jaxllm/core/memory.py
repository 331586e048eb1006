"""The arithmetic of memory: what the engine allocates and what `jaxllm plan` says of a device that is not there.

Every number is of one device. Sizes are in bytes unless their name says otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxllm.config import EngineConfig
from jaxllm.core.kv_cache import CacheGroup, cdiv
from jaxllm.errors import OutOfMemoryError

BUDGETS = {"cpu": 1024, "tpu": 2048}  # of tokens a step
BUDGET = 8192  # elsewhere


def default_limits(config: EngineConfig, platform: str) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens) of the options, or what is chosen where they are None.

    On TPUs 2048 tokens: FLOPs decide from a few hundred on, and of so many the arrays between products still fit into
    VMEM where results stay there at all, while of 8192 they go through HBM, up to 2.9 times the bytes (docs/tpu.md).
    """
    max_num_seqs = config.max_num_seqs or (32 if platform == "cpu" else 256)
    return max_num_seqs, config.max_num_batched_tokens or max(BUDGETS.get(platform, BUDGET), max_num_seqs)


def default_rungs(budget: int, platform: str) -> tuple[int, ...]:
    """Step sizes worth an executable each: powers of two, as the scheduler cuts chunks to land on one. Of the small
    ones only some, since a small step's time is that of reading the weights; none below 64 where decodes have rungs of
    their own. On GPUs also those half way between two powers, from 256 tokens on, where time goes with tokens: of
    requests that arrive one by one fewer then wait for padding (simulated at 28 requests/s for an 8B model on an H100,
    the last of a hundred waits 69 ms for its first token instead of 84)."""
    small = (1, 4, 16, 32) if platform == "cpu" else ()
    powers = [2**i for i in range(6, budget.bit_length())]
    halves = [3 * power // 2 for power in powers if power >= 256] if platform == "gpu" else []
    return tuple(sorted({size for size in (*small, *powers, *halves) if size < budget} | {budget}))


def default_decode_rungs(max_num_seqs: int, on_cpu: bool) -> tuple[int, ...]:
    """Sizes of steps in which every row has one token; none on a CPU. The least is 2: for one row XLA:GPU multiplies
    and sums instead of taking a product, which takes 1.5 times as long over Qwen3-0.6B's matrices, as long over
    Llama-3.1-8B's, and 1.3 times where such a product is split over its depth."""
    ladder = () if on_cpu else (2, 8, 32, 64, 128, 192, max_num_seqs)
    return tuple(sorted({size for size in ladder if size <= max_num_seqs}))


def table_bytes(max_num_seqs: int, vocab_size: int, length: int) -> int:
    """The slots' tables: what the sampler counts and masks, token ids, stop strings, masks."""
    return max_num_seqs * (vocab_size * 5 + length * 4 + 128 * 16 * 4 + vocab_size // 8)


def step_bytes(
    budget: int, max_num_seqs: int, *, hidden_size: int, intermediate_size: int, vocab_size: int, itemsize: int
) -> int:
    """Temporaries of the largest step and its sampler.

    A step holds its widest activations (gate and up at once where no kernel joins them), and all tokens' hidden rows
    where a prompt's logprobs are asked for; the sampler float32 logits of all rows and five copies.
    """
    widest = 2 * intermediate_size + 4 * hidden_size
    return budget * widest * itemsize + 6 * max_num_seqs * vocab_size * 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """Where an accelerator's memory goes before the cache.

    Attributes:
      limit: what JAX may use of the device.
      utilization: the share of it that the engine plans with.
      weights, step, tables: see `step_bytes` and `table_bytes`.
      step_tokens: of the largest step, for the message.
    """

    limit: int
    utilization: float
    weights: int
    step: int
    tables: int
    step_tokens: int

    @property
    def budgeted(self) -> int:
        return int(self.limit * self.utilization)

    @property
    def left(self) -> int:
        """For the KV cache; may be negative."""
        return self.budgeted - self.weights - self.step - self.tables

    def cache(self) -> int:
        """What is left for the KV cache. Raises OutOfMemoryError if that is nothing."""
        if self.left <= 0:
            raise OutOfMemoryError(
                f"{self.utilization:.0%} of {self.limit / 1e9:.1f} GB is {self.budgeted / 1e9:.1f} GB; weights take "
                f"{self.weights / 1e9:.1f} GB, a step of {self.step_tokens} tokens {self.step / 1e9:.1f} GB, the "
                f"slots' tables {self.tables / 1e9:.1f} GB: nothing is left for the KV cache"
            )
        return self.left


def cache_groups(
    windows: Mapping[int, int | None],
    page_bytes: Mapping[int, int],
    cache_bytes: int,
    *,
    page_size: int,
    max_num_seqs: int,
    budget: int,
    longest: int,
    asked: int | None = None,
) -> tuple[CacheGroup, ...]:
    """Window groups get what all slots can ever use, at most half of the memory together; the full group the rest.

    Args:
      windows: each group's sliding window in tokens, None for full attention, by the group's number.
      page_bytes: of one page in all layers of a group.
      longest: tokens of the longest request.
      asked: kv_cache_memory_bytes as it was given, for the message.

    Raises:
      OutOfMemoryError: a group's part does not hold a page.
    """
    longest = cdiv(longest, page_size)
    pages: dict[int, int] = {}
    left = cache_bytes
    num_windows = sum(window is not None for window in windows.values())
    for group, window in sorted(windows.items(), reverse=True):
        most = max_num_seqs * longest
        if window is not None:
            most = min(most, max_num_seqs * (cdiv(window, page_size) + 1) + cdiv(budget, page_size))
        share = left if num_windows == 0 or window is None else cache_bytes // 2 // num_windows
        if len(windows) == num_windows:
            share = cache_bytes // num_windows
        if share < page_bytes[group]:
            raise OutOfMemoryError(
                f"kv_cache_memory_bytes={asked}: {max(share, 0)} bytes of the KV cache's {cache_bytes} are for group "
                f"{group_name(window)!r}, where one page of {page_size} tokens takes {page_bytes[group]} bytes"
            )
        pages[group] = min(most, share // page_bytes[group]) + 1
        left -= pages[group] * page_bytes[group]
    return tuple(CacheGroup(group_name(windows[g]), pages[g], page_size, windows[g]) for g in sorted(pages))


def group_name(window: int | None) -> str:
    return "full" if window is None else f"window {window}"


def longest_that_fits(groups: Sequence[CacheGroup], limit: int) -> int:
    """Tokens of the longest request that the cache holds, at most `limit`."""
    return min([limit, *((group.num_pages - 1) * group.page_size for group in groups if group.window is None)])


def check_longest_fits(groups: Sequence[CacheGroup], max_model_len: int, cache_bytes: int) -> None:
    """Raises OutOfMemoryError if the cache does not hold one request of `max_model_len` tokens."""
    for group in groups:
        tokens = (group.num_pages - 1) * group.page_size
        wanted = max_model_len if group.window is None else min(max_model_len, group.window + group.page_size)
        if tokens < wanted or group.num_pages < 2:
            raise OutOfMemoryError(
                f"the KV cache of {cache_bytes / 1e6:.3g} MB holds {max(tokens, 0)} tokens in group "
                f"{group.name!r}; max_model_len={max_model_len} needs {wanted}. "
                "Raise kv_cache_memory_bytes or lower max_model_len"
            )
