"""What an engine's options are called on a command line. Imports next to nothing: it is read before JAX is."""

import math
from collections.abc import Sequence

from jaxllm.config import ALIASES

SHORT = {"tensor_parallel_size": "-tp", "data_parallel_size": "-dp"}  # as in vLLM


def flags_of(name: str) -> list[str]:
    """All flags of an option by its field's name: its own first, then other engines' names, then the short one."""
    names = [name, *(alias for alias, field in ALIASES.items() if field == name)]
    return ["--" + each.replace("_", "-") for each in names] + ([SHORT[name]] if name in SHORT else [])


def num_devices(words: Sequence[str]) -> int:
    """How many devices a command line that nobody has parsed yet asks for. What is no number counts as 1: the parser
    will refuse it."""
    return math.prod(_last_number(words, flags_of(name)) for name in SHORT)


def _last_number(words: Sequence[str], flags: Sequence[str]) -> int:
    found = 1
    for place, word in enumerate(words):
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        if flag in flags:
            text = value if equals else "".join(words[place + 1 : place + 2])
            found = int(text) if text.isdecimal() else 1
    return found
