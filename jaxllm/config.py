"""Every option of the engine, with its default, its check and its help."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import ConfigError


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
    """Options of one engine. None means: chosen for the model and the device, see `jaxllm.engine.resolve`.

    The help texts are the documentation of each field. Raises ConfigError naming the field and its limit.
    """

    model: str = _option("smollm2", "'smollm2', a Hugging Face directory or id, or a .gguf file")
    revision: str | None = _option(None, "branch, tag or commit of a Hugging Face id")
    load_format: Literal["auto", "dummy"] = _option("auto", "'dummy' makes random weights from config.json alone")
    dtype: Literal["auto", "float32", "bfloat16"] = _option("auto", "auto: float32 on CPU, bfloat16 elsewhere")
    max_model_len: int | None = _option(None, "most tokens of one request, prompt and output; None: the model's limit")
    max_num_seqs: int | None = _option(None, "requests that run at once; None: 32 on CPU, 256 elsewhere")
    max_num_batched_tokens: int | None = _option(None, "token budget of a step; None: 1024 on CPU, 8192 elsewhere")
    token_rungs: tuple[int, ...] | None = _option(None, "compiled step sizes; None: powers of two up to the budget")
    page_size: int = _option(64, "tokens in a page of the KV cache")
    memory_utilization: float = _option(0.9, "share of an accelerator's memory that weights, cache and steps may take")
    kv_cache_memory_bytes: int | None = _option(
        None, "memory of the KV cache; None: what is left on accelerators, 400 MB on CPU"
    )
    enable_prefix_caching: bool = _option(True, "keep pages of finished requests for prompts that begin the same")
    scheduling_policy: Literal["fcfs", "priority"] = _option("fcfs", "order of arrival, or lower priority number first")
    max_waiting_requests: int | None = _option(None, "refuse requests beyond so many waiting ones; None: no limit")
    max_waiting_tokens: int | None = _option(None, "refuse requests beyond so many waiting prompt tokens")
    data_parallel_size: int = _option(1, "ranks that each hold the weights, a cache and a batch of their own")
    seed: int = _option(0, "seeds the requests that bring none")
    attention_backend: Literal["reference", "xla", "gpu"] | None = _option(None, "None: the best for the device")
    engine_process: bool = _option(False, "run the engine core in a process of its own")
    compilation_cache_dir: str | None = _option(
        None, "where compiled steps are kept; None: $JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxllm/xla"
    )
    warm_up: bool = _option(True, "compile all step sizes in the background after the first ones are ready")

    def __post_init__(self) -> None:
        def need(holds: bool, field: str, limit: str) -> None:
            if not holds:
                raise ConfigError(f"{field}={getattr(self, field)!r}: {limit}")

        for field in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
            value = getattr(self, field)
            need(value is None or (isinstance(value, int) and value >= 1), field, "must be an integer of at least 1")
        need(isinstance(self.page_size, int) and 1 <= self.page_size <= 1024, "page_size", "must be in [1, 1024]")
        need(0 < self.memory_utilization <= 1, "memory_utilization", "must be in (0, 1]")
        need(self.load_format in ("auto", "dummy"), "load_format", "must be 'auto' or 'dummy'")
        need(self.dtype in ("auto", "float32", "bfloat16"), "dtype", "must be 'auto', 'float32' or 'bfloat16'")
        need(self.scheduling_policy in ("fcfs", "priority"), "scheduling_policy", "must be 'fcfs' or 'priority'")
        need(self.attention_backend in (None, "reference", "xla", "gpu"), "attention_backend", "is unknown")
        need(
            isinstance(self.data_parallel_size, int) and self.data_parallel_size >= 1,
            "data_parallel_size",
            "must be an integer of at least 1",
        )
        if self.token_rungs is not None:
            self.token_rungs = tuple(self.token_rungs)

    @property
    def cache_directory(self) -> Path:
        """Where compiled executables are kept."""
        chosen = self.compilation_cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR")
        return Path(chosen) if chosen else Path.home() / ".cache" / "jaxllm" / "xla"


def config_from(model: str, options: dict[str, Any]) -> EngineConfig:
    """EngineConfig(model=model, **options), with a ConfigError that names an unknown option and its nearest match."""
    import difflib

    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(f"unknown option {name!r}{hint} Options: {', '.join(known)}")
    return EngineConfig(model=model, **options)
