"""Tiny models with weights that make every token depend on all before it, and a second opinion on their logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxllm import LLM, SamplingParams

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 300, 32, 48, 2, 4, 2, 8
UNK, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
WORDS = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "the", "ing", "and", " a", " t", " s"]

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
    "mistral": {**_COMMON, "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "sliding_window": 19},
    "gemma2": {  # two cache groups, soft caps, scaled and tied embeddings
        **_COMMON,
        "architectures": ["Gemma2ForCausalLM"],
        "sliding_window": 19,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    },
}
OPTIONS = dict(max_num_seqs=32, max_num_batched_tokens=128, token_rungs=(4, 32, 128), page_size=8, warm_up=False)

LEAST = dict(max_num_seqs=1, max_num_batched_tokens=4, token_rungs=(4,))  # as little as warm-up can compile


def tensors(kind: str, seed: int = 0, num_heads: int = HEADS, num_kv_heads: int = KV_HEADS) -> dict[str, np.ndarray]:
    """Weights of unit gain, so that no layer drowns in the residual stream."""
    rng = np.random.default_rng(seed)
    gemma = kind == "gemma2"

    def linear(out: int, width: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((out, width)) * gain / width**0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return ((0 if gemma else 1) + 0.1 * rng.standard_normal(HIDDEN)).astype(np.float32)

    found = {"model.embed_tokens.weight": 0.5 * linear(VOCAB, HIDDEN, HIDDEN**0.5), "model.norm.weight": norm()}
    if not gemma:
        found["lm_head.weight"] = linear(VOCAB, HIDDEN, 3.0)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{name}.weight"] = norm()
        if gemma:
            for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
                found[f"{at}{name}.weight"] = norm()
        for name, heads in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
            found[f"{at}self_attn.{name}_proj.weight"] = linear(heads * HEAD_DIM, HIDDEN, 1.5)
        found[f"{at}self_attn.o_proj.weight"] = linear(HIDDEN, num_heads * HEAD_DIM, 1.5)
        for name in ("gate", "up"):
            found[f"{at}mlp.{name}_proj.weight"] = linear(MLP, HIDDEN, 1.5)
        found[f"{at}mlp.down_proj.weight"] = linear(HIDDEN, MLP, 1.5)
    return found


def write_tokenizer(directory: Path) -> None:
    """Byte-level, with a few longer tokens; ids: 3 special ones, 256 bytes, WORDS, and some that spell nothing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from jaxllm.text.token_bytes import byte_alphabet

    spelling = {byte: character for character, byte in byte_alphabet().items()}
    vocab = {"<unk>": UNK, "<s>": BOS, "</s>": EOS} | {spelling[byte]: FIRST_BYTE + byte for byte in range(256)}
    merges = []
    for word in WORDS:
        spelled = "".join(spelling[byte] for byte in word.encode())
        merges.append((spelled[:-1], spelled[-1]))
        vocab[spelled] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def write_checkpoint(kind: str, directory: Path, **config: Any) -> Path:
    """A Hugging Face directory of that kind."""
    directory.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[kind] | config
    (directory / "config.json").write_text(json.dumps(config))
    heads = {name: config[name] for name in ("num_attention_heads", "num_key_value_heads")}
    save_file(tensors(kind, 0, *heads.values()), directory / "model.safetensors")
    write_tokenizer(directory)
    return directory


def llm(model: Path | str, **options: Any) -> LLM:
    """An engine over it with small sizes."""
    return LLM(str(model), **{**OPTIONS, **options})


def reference_logits(ids: list[int]) -> np.ndarray:
    """float64[T, V]: the "llama" model in plain numpy, no cache."""
    weights = {name: value.astype(np.float64) for name, value in tensors("llama").items()}
    length = len(ids)
    positions = np.arange(length)[:, None] * 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = np.cos(positions)[:, None], np.sin(positions)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]

    def rotate(x: np.ndarray) -> np.ndarray:
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        x = norm(hidden, f"{at}input_layernorm")
        q, k, v = ((x @ weights[f"{at}self_attn.{n}_proj.weight"].T).reshape(length, -1, HEAD_DIM) for n in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        chances = np.exp(scores - scores.max(axis=-1, keepdims=True))
        chances /= chances.sum(axis=-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", chances, v).reshape(length, -1)
        hidden = hidden + attended @ weights[f"{at}self_attn.o_proj.weight"].T
        x = norm(hidden, f"{at}post_attention_layernorm")
        gate, up = (x @ weights[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{at}mlp.down_proj.weight"].T
    return norm(hidden, "model.norm") @ weights["lm_head.weight"].T


def reference_logprobs(ids: list[int]) -> np.ndarray:
    """float64[T, V]: log-softmax of `reference_logits`."""
    logits = reference_logits(ids)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random token ids of all lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(FIRST_BYTE, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def mixed_params(index: int, **changes: Any) -> SamplingParams:
    """The index-th of a row of parameters that differ in everything: half of them greedy, half seeded."""
    rng = np.random.default_rng(1000 + index)
    params: dict[str, Any] = dict(temperature=0, max_tokens=int(rng.integers(4, 25)), seed=index)
    if index % 2:
        params["temperature"] = float(rng.choice([0.5, 1.0, 1.5]))
        params |= [{}, {"top_p": 0.8}, {"top_k": 12}, {"min_p": 0.05}][index // 2 % 4]
    extras: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"repetition_penalty": 1.3},
        {"logit_bias": {7: 4.0, 11: -100.0}},
        {"allowed_token_ids": list(range(0, VOCAB, 3))},
        {"min_tokens": 4, "stop_token_ids": list(range(100, 200))},
        {"bad_words": ["e", "the", "qu"], "logprobs": 3},
        {"ignore_eos": True, "logprobs": 0},
    ]
    return SamplingParams(**{**params, **extras[index // 3 % len(extras)], **changes})
