"""The workloads that every engine is measured on: plain token ids, so that no tokenizer and no data set is needed.

A workload is a list of (prompt_token_ids, max_new_tokens), all submitted at once, greedy and with end-of-sequence
ignored, so that every engine does exactly the same work. Seeds are fixed: figures taken on other engines with the same
lists stay comparable, so nothing here may change what is generated (a test holds the first tokens).
"""

import random
from collections.abc import Callable
from typing import Any

Request = tuple[list[int], int]  # prompt token ids, tokens to generate
Workload = list[Request]


def _prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """Ids away from both ends of the vocabulary, where special tokens live."""
    return [rng.randrange(10, vocab_size - 10) for _ in range(length)]


def uniform(seed: int, vocab_size: int, n: int, tokens_in: int, tokens_out: int) -> Workload:
    """`n` random prompts of the same lengths."""
    rng = random.Random(seed)
    return [(_prompt(rng, tokens_in, vocab_size), tokens_out) for _ in range(n)]


def single_stream(vocab_size: int, n: int = 1) -> Workload:
    """Batch-1 decode: 128 tokens in, 512 out."""
    return uniform(1, vocab_size, n, 128, 512)


def random_1024_128(vocab_size: int, n: int = 512) -> Workload:
    """The default shape of `vllm bench throughput`: 1024 in, 128 out."""
    return uniform(2, vocab_size, n, 1024, 128)


def ragged(vocab_size: int, n: int = 256) -> Workload:
    """The shape of nano-vllm's benchmark: 100 to 1024 in and 100 to 1024 out, uniform."""
    rng = random.Random(3)
    return [(_prompt(rng, rng.randint(100, 1024), vocab_size), rng.randint(100, 1024)) for _ in range(n)]


def decode_heavy(vocab_size: int, n: int = 256) -> Workload:
    """Many chats amid their answers: 128 in, 512 out."""
    return uniform(4, vocab_size, n, 128, 512)


def prefill_heavy(vocab_size: int, n: int = 64) -> Workload:
    """Classifying long documents: 4096 in, 1 out."""
    return uniform(5, vocab_size, n, 4096, 1)


def shared_prefix(vocab_size: int, n: int = 256) -> Workload:
    """One system prompt of 2048 tokens, 128 tokens of each user's own, 64 out."""
    rng = random.Random(6)
    system = _prompt(rng, 2048, vocab_size)
    return [(system + _prompt(rng, 128, vocab_size), 64) for _ in range(n)]


def long_context(vocab_size: int, n: int = 16) -> Workload:
    """Long documents: 16384 in, 256 out."""
    return uniform(7, vocab_size, n, 16384, 256)


def static_batch_1(vocab_size: int, n: int = 1) -> Workload:
    """128 in, 64 out: what a static batch of Hugging Face's `generate` does; also 32 and 128 at once."""
    return uniform(12, vocab_size, n, 128, 64)


def static_batch_32(vocab_size: int, n: int = 32) -> Workload:
    """`static_batch_1`, 32 at once."""
    return static_batch_1(vocab_size, n)


def static_batch_128(vocab_size: int, n: int = 128) -> Workload:
    """`static_batch_1`, 128 at once."""
    return static_batch_1(vocab_size, n)


# For the 135M default model on two CPU cores. The single prompts are for its vocabulary of 49152.
CPU_SINGLE: Request = (_prompt(random.Random(9), 64, 49152), 128)  # batch-1 decode
CPU_PREFILL: list[int] = _prompt(random.Random(10), 1024, 49152)  # one token out


def cpu_single(vocab_size: int = 49152) -> Workload:
    """Batch-1 decode on a CPU: 64 in, 128 out."""
    return uniform(9, vocab_size, 1, 64, 128)


def cpu_prefill(vocab_size: int = 49152) -> Workload:
    """One prompt of 1024 tokens on a CPU, 1 out."""
    return uniform(10, vocab_size, 1, 1024, 1)


def cpu_ragged(vocab_size: int = 49152, n: int = 32) -> Workload:
    """An offline batch on a CPU: 32 to 256 in, 16 to 128 out."""
    rng = random.Random(11)
    return [(_prompt(rng, rng.randint(32, 256), vocab_size), rng.randint(16, 128)) for _ in range(n)]


def poisson_arrivals(
    vocab_size: int, rate: float, n: int = 256, mean_in: int = 512, mean_out: int = 128
) -> list[tuple[float, list[int], int]]:
    """Online serving: (arrival in seconds, prompt_token_ids, max_new_tokens), arriving at `rate` requests/s.

    Lengths are uniform on [mean/2, 3*mean/2].
    """
    rng = random.Random(8)
    clock, requests = 0.0, []
    for _ in range(n):
        clock += rng.expovariate(rate)
        prompt = _prompt(rng, rng.randint(mean_in // 2, 3 * mean_in // 2), vocab_size)
        requests.append((clock, prompt, rng.randint(mean_out // 2, 3 * mean_out // 2)))
    return requests


WORKLOADS: dict[str, Callable[..., Workload]] = {
    f.__name__: f
    for f in (single_stream, random_1024_128, ragged, decode_heavy, prefill_heavy, shared_prefix, long_context)
}
CPU_WORKLOADS: dict[str, Callable[..., Workload]] = {f.__name__: f for f in (cpu_single, cpu_prefill, cpu_ragged)}
STATIC_WORKLOADS: dict[str, Callable[..., Workload]] = {
    f.__name__: f for f in (static_batch_1, static_batch_32, static_batch_128)
}
OTHER_WORKLOADS: dict[str, Callable[..., Workload]] = {**STATIC_WORKLOADS, **CPU_WORKLOADS}

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN_3: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# Contents of config.json by name: weights are random, only the shapes matter.
MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen3-0.6b": {
        **_QWEN_3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        **_QWEN_3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
