"""Which tokens end an output."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.text.tokenizer import Tokenizer


def eos_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], tokenizer: "Tokenizer | None"
) -> frozenset[int]:
    """All that the model's files name: config.json, generation_config.json and the tokenizer."""
    ids: set[int] = set()
    for value in (config.get("eos_token_id"), generation_config.get("eos_token_id")):
        ids.update([value] if isinstance(value, int) else value or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)
