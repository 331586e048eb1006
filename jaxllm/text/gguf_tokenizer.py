"""Tokenizers rebuilt from GGUF metadata.

The metadata names a kind of vocabulary ("gpt2": byte-level BPE, "llama": SentencePiece) and, for the first, how text is
cut before merging ("pre"). The cuts are those of the models' published tokenizer.json files; llama.cpp lists the names
in `llama-vocab.cpp`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jaxllm.errors import CheckpointError, UnsupportedModelError
from jaxllm.text.sentencepiece_bpe import derive_merges
from jaxllm.text.tokenizer import Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = _WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    _WORDS.replace("|", _CONTRACTIONS + "?|")
    + _CONTRACTIONS
    + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_NAMES = ("default", "gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling")
_DIGITS_NAMES = ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b")
_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_SPLITS = (
    dict.fromkeys(_LLAMA3_NAMES, _LLAMA3)
    | dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _LLAMA3)
    | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "grok-2"), _QWEN2)
    | {"tekken": _TEKKEN, "gpt-4o": _GPT4O, "llama4": _GPT4O}
)
_IGNORE_MERGES = (*_LLAMA3_NAMES, "tekken")  # a piece that is a token is taken whole
_NFC = ("qwen2", "deepseek-r1-qwen", "megrez")  # text is composed first


def _strings(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A metadata array of strings; empty if absent."""
    value = metadata.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{where}: corrupt: {key} is no array of strings")
    return value


def _numbers(metadata: Mapping[str, Any], key: str, where: str, count: int) -> list[float] | None:
    """A metadata array of `count` finite numbers; None if absent."""
    value = metadata.get(key)
    if value is None:
        return None
    array = np.asarray(value) if isinstance(value, np.ndarray) or value == [] else np.empty(0, object)
    if array.dtype.kind not in "iuf" or array.shape != (count,) or not np.all(np.isfinite(array)):
        raise CheckpointError(f"{where}: corrupt: {key} is no array of {count} numbers")
    return array.tolist()


def _flag(metadata: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: corrupt: tokenizer.ggml.{name} is no boolean")
    return value


def _merges(metadata: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    """The pairs of tokenizer.ggml.merges, best first; empty if absent."""
    pairs = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", where):
        left, space, right = merge.partition(" ")
        if not space:
            raise CheckpointError(f"{where}: corrupt: tokenizer.ggml.merges holds {merge!r}")
        pairs.append((left, right))
    return pairs


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], where: str) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str):
        raise CheckpointError(f"{where}: corrupt: tokenizer.ggml.pre is no string")
    merges = _merges(metadata, where)
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORE_MERGES)
    except Exception as error:  # a merge of tokens that are not in the vocabulary
        raise CheckpointError(f"{where}: corrupt: tokenizer.ggml.merges: {error}") from error
    backend = Backend(model)
    if pre in _GPT2_NAMES:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in _DIGITS_NAMES:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre in _SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        known = ", ".join(sorted({*_GPT2_NAMES, *_DIGITS_NAMES, *_SPLITS}))
        raise UnsupportedModelError(f"{where}: tokenizer.ggml.pre={pre!r}; jaxllm builds {known}")
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], where: str, arch: str) -> Backend:
    gemma = arch.startswith("gemma")
    if gemma:  # files write runs of spaces as spaces
        runs = {text: "▁" * len(text) for text in vocab if text and not text.strip(" ")}
        vocab = {runs[text] if runs.get(text, text) not in vocab else text: token for text, token in vocab.items()}
    merges = _merges(metadata, where)
    if not merges:
        scores = _numbers(metadata, "tokenizer.ggml.scores", where, len(metadata["tokenizer.ggml.tokens"]))
        if scores is None:
            raise CheckpointError(f"{where}: tokenizer.ggml.scores is missing")
        # Gemma's scores do not follow the order of its merges; the order of its tokens does
        ranks = {text: -token if gemma else scores[token] for text, token in vocab.items()}
        merges = derive_merges(vocab, ranks)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokens = metadata["tokenizer.ggml.tokens"]
    unk_token = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    try:
        model = models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    except Exception as error:
        raise CheckpointError(f"{where}: corrupt: tokenizer.ggml.merges: {error}") from error
    backend = Backend(model)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(metadata, "add_space_prefix", where, not gemma):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(steps)
    return backend


def _surround(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Makes `backend` put these tokens (None: no token) around every text that it encodes."""
    around = [text for text in (bos, eos) if text is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])],
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys(around)],
    )


def _added(backend: Backend, tokens: Sequence[str], kinds: Sequence[float]) -> list[AddedToken]:
    """Tokens found in a text before it is cut: control tokens, which are special, and user-defined ones."""
    return [
        AddedToken(text, normalized=False, special=kind != _USER_DEFINED)
        for text, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and backend.token_to_id(text) is not None
    ]


def from_gguf(metadata: Mapping[str, Any], where: str, arch: str = "") -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Args:
      metadata: the file's metadata.
      where: the file, for messages.
      arch: its architecture; Gemma's SentencePiece differs from the others'.

    Raises:
      CheckpointError: the vocabulary is missing or contradicts itself.
      UnsupportedModelError: a kind of vocabulary or of cut that jaxllm does not build.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(metadata, "tokenizer.ggml.tokens", where)
    if kind is None or not tokens:
        raise CheckpointError(f"{where}: the file holds no tokenizer (tokenizer.ggml.model and tokens)")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"{where}: tokenizer.ggml.model={kind!r}; jaxllm builds 'gpt2' and 'llama'")
    vocab = {text: token for token, text in enumerate(tokens)}
    kinds = _numbers(metadata, "tokenizer.ggml.token_type", where, len(tokens)) or [1] * len(tokens)
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{where}: corrupt: {len(tokens)} tokens, of which {len(vocab)} are distinct")
    backend = _byte_level(metadata, vocab, where) if kind == "gpt2" else _sentencepiece(metadata, vocab, where, arch)
    backend.add_tokens(_added(backend, tokens, kinds))

    def token_text(role: str) -> str | None:
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return tokens[token] if isinstance(token, int) and 0 <= token < len(tokens) else None

    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special_tokens = {name: text for name, role in roles.items() if (text := token_text(role)) is not None}
    # llama.cpp puts a beginning before SentencePiece and Llama 3 texts unless the file says otherwise
    default_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    bos = special_tokens.get("bos_token") if _flag(metadata, "add_bos_token", where, default_bos) else None
    eos = special_tokens.get("eos_token") if _flag(metadata, "add_eos_token", where, False) else None
    _surround(backend, bos, eos)
    templates = {"default": text} if isinstance(text := metadata.get("tokenizer.chat_template"), str) else {}
    for key, text in metadata.items():
        if key.startswith("tokenizer.chat_template.") and isinstance(text, str):
            templates[key.removeprefix("tokenizer.chat_template.")] = text
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates=templates)
