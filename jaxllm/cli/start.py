"""Starting the engine for a command."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.core.sampling_params import SamplingParams
    from jaxllm.llm import LLM

_SAMPLES = {"temperature", "top_p", "top_k", "min_p", "seed"}  # any of them means: do sample
BYTES_A_TOKEN = 3.5  # of UTF-8; English text has 4 to 5, so that the estimate is rather too long


def shows_progress(quiet: bool = False) -> bool:
    """Whether to draw progress bars: somebody looks at stderr."""
    return not quiet and sys.stderr.isatty()


def prompt_length(text: str) -> int:
    """About how many tokens a text has. It only decides which step is compiled first."""
    return int(len(text.encode()) / BYTES_A_TOKEN) + 1


def longest_request(prompts: list[str], max_tokens: int) -> int:
    """Tokens that no request passes: a token has at least a byte, and a few special ones may stand before the prompt.
    A power of two of at least 1024, so that compiled steps fit the next call too."""
    most = max(len(prompt.encode()) for prompt in prompts) + 16 + max_tokens
    return max(1024, 1 << (most - 1).bit_length())


def open_llm(
    model: str,
    options: dict[str, Any],
    sampling: dict[str, Any],
    *,
    prompt_length: int,
    longest: int | None = None,
    progress: bool = False,
) -> "LLM":
    """An engine, started once the parameters are known to be good. Raises any of jaxllm.errors.

    prompt_length, longest: see `jaxllm.core.expected.Expected`; progress: draw a bar while the weights load.
    """
    from jaxllm.cli import wait_for_preload
    from jaxllm.core.expected import Expected
    from jaxllm.core.sampling_params import SamplingParams

    greedy = {} if _SAMPLES & sampling.keys() else {"temperature": 0.0}  # what most models' defaults come to
    params = SamplingParams(**{**greedy, **sampling})
    wait_for_preload()
    from jaxllm.llm import LLM

    return LLM(model, expected=Expected(prompt_length, params, longest), progress=progress, **options)


def follow_if_asked(model: str, options: dict[str, Any]) -> None:
    """Where the options make this process follow another's engine it does so, and then ends with SystemExit; commands
    whose engine runs in a process of its own need not start one."""
    if options.get("process_id"):
        from jaxllm.llm import LLM

        LLM(model, **options)


def sampling_params(llm: "LLM", given: dict[str, Any]) -> "SamplingParams":
    """The model's default parameters with those that were given over them; greedy if neither says how to sample."""
    import dataclasses

    model = llm.get_default_sampling_params()
    silent = (model.temperature, model.top_p, model.top_k, model.min_p) == (1.0, 1.0, 0, 0.0)
    if silent and not _SAMPLES & given.keys():
        given = {**given, "temperature": 0.0}
    return dataclasses.replace(model, **given)
