"""Tokenizers from a Hugging Face directory: tokenizer.json and the files around it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxllm.errors import CheckpointError, UnsupportedModelError
from jaxllm.text.tokenizer import Tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def _text(entry: Any) -> str | None:
    """A token's text, stored as a string or as an object with "content"."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files win over the entry in tokenizer_config.json, as in Hugging Face Transformers."""
    stored = config.get("chat_template")
    templates = {"default": stored} if isinstance(stored, str) else {}
    if isinstance(stored, list):
        templates = {
            entry["name"]: entry["template"]
            for entry in stored
            if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        }
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    elif (directory / "chat_template.json").is_file():  # where multimodal models keep it
        legacy = _read_object(directory / "chat_template.json").get("chat_template")
        if isinstance(legacy, str):
            templates["default"] = legacy
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return templates


def _add_configured_tokens(backend: Backend, config: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Tokens that tokenizer_config.json knows and tokenizer.json does not, and tokens that only it calls special."""
    known = backend.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder")
    for number, entry in sorted((listed if isinstance(listed, dict) else {}).items(), key=lambda item: int(item[0])):
        text = _text(entry)
        if text is None or int(number) in known:
            continue
        flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        backend.add_tokens([AddedToken(text, **flags)])
    special = {entry.content for entry in backend.get_added_tokens_decoder().values() if entry.special}
    missing = [text for text in dict.fromkeys(special_tokens.values()) if text not in special]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def from_directory(directory: Path) -> Tokenizer:
    """Builds the tokenizer of a Hugging Face directory.

    Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat template files. What is put around a
    text is what tokenizer.json says: as in Transformers 5, add_bos_token and add_eos_token are not looked at beside it.

    Raises:
      CheckpointError: tokenizer.json is missing, or a file is corrupt.
      UnsupportedModelError: the directory holds a SentencePiece model only.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        if (directory / "tokenizer.model").is_file():
            raise UnsupportedModelError(
                f"{directory}: tokenizer.model (SentencePiece) without tokenizer.json; save one with Transformers: "
                "AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"
            )
        raise CheckpointError(f"{directory}: tokenizer.json is missing")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error
    config = _read_object(directory / "tokenizer_config.json")
    mapped = _read_object(directory / "special_tokens_map.json")
    entries = {role: _text(config.get(role)) or _text(mapped.get(role)) for role in _ROLES}
    special_tokens = {role: text for role, text in entries.items() if text is not None}
    try:
        _add_configured_tokens(backend, config, special_tokens)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / 'tokenizer_config.json'}: corrupt added tokens: {error}") from error
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates=_chat_templates(directory, config))
