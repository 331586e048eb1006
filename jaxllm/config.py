"""Every option of the engine, with its default, its check and its help."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jaxllm.errors import ConfigError


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def _whole(value: Any) -> bool:
    """Whether it is an integer of at least 1; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
    """Options of one engine. None means: chosen for the model and the device, see `jaxllm.engine.resolve`.

    The help texts are the documentation of each field. Raises ConfigError naming the field, its value and its limit.
    """

    model: str = _option("smollm2", "'smollm2', a Hugging Face directory or id, or a .gguf file")
    revision: str | None = _option(None, "branch, tag or commit of a Hugging Face id")
    load_format: Literal["auto", "safetensors", "orbax", "dummy"] = _option(
        "auto",
        "'safetensors' wants these; 'orbax' what jaxllm convert wrote; 'dummy' makes random weights from config.json "
        "alone",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _option("auto", "auto: float32 on CPU, bfloat16 elsewhere")
    max_model_len: int | None = _option(None, "most tokens of one request, prompt and output; None: the model's limit")
    max_num_seqs: int | None = _option(None, "requests that run at once; None: 32 on CPU, 256 elsewhere")
    max_num_batched_tokens: int | None = _option(
        None, "token budget of a step; None: 1024 on CPU, 2048 on TPU, 8192 on GPU"
    )
    token_rungs: tuple[int, ...] | None = _option(None, "compiled step sizes; None: chosen, about powers of two")
    decode_rungs: tuple[int, ...] | None = _option(
        None, "compiled sizes of steps whose rows all have one token; None: a ladder up to max_num_seqs, none on CPU"
    )
    page_size: int = _option(64, "tokens in a page of the KV cache")
    memory_utilization: float = _option(0.9, "share of an accelerator's memory that weights, cache and steps may take")
    kv_cache_memory_bytes: int | None = _option(
        None, "memory of the KV cache; None: what is left on accelerators, 400 MB on CPU"
    )
    enable_prefix_caching: bool = _option(True, "keep pages of finished requests for prompts that begin the same")
    scheduling_policy: Literal["fcfs", "priority"] = _option("fcfs", "order of arrival, or lower priority number first")
    max_waiting_requests: int | None = _option(None, "refuse requests beyond so many waiting ones; None: no limit")
    max_waiting_tokens: int | None = _option(None, "refuse requests beyond so many waiting prompt tokens")
    tensor_parallel_size: int = _option(1, "devices that share each layer's heads and MLP, and the vocabulary")
    data_parallel_size: int = _option(1, "ranks that each hold the weights, a cache and a batch of their own")
    disable_custom_all_reduce: bool = _option(
        False, "leave sums over tensor-parallel GPUs to NCCL, as is done where these cannot reach each other's memory"
    )
    seed: int = _option(0, "seeds the requests that bring none")
    attention_backend: Literal["reference", "xla", "gpu", "tpu"] | None = _option(None, "None: the best for the device")
    engine_process: bool = _option(False, "run the engine core in a process of its own")
    max_engine_restarts: int = _option(
        3, "start that process again when it dies, so often within ten minutes; its requests go on. 0: never"
    )
    engine_timeout: float | None = _option(
        300.0, "seconds without a sign of life, compilations left out, until that process is killed; None: no limit"
    )
    compilation_cache_dir: str | None = _option(
        None, "where compiled steps are kept; None: $JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxllm/xla"
    )
    warm_up: bool = _option(True, "compile all step sizes in the background after the first ones are ready")
    coordinator_address: str | None = _option(
        None, "HOST:PORT of process 0 of several, the same for all of them; 'auto' finds it on TPU slices and clusters"
    )
    num_processes: int | None = _option(None, "how many processes run the engine; None: found, see coordinator_address")
    process_id: int | None = _option(None, "this process's number; 0 schedules, the others follow")
    heartbeat_timeout_seconds: int = _option(30, "seconds without a sign of life after which a process counts as lost")

    def __post_init__(self) -> None:
        def need(holds: bool, field: str, limit: str) -> None:
            if not holds:
                raise ConfigError(f"{field}={getattr(self, field)!r}: {limit}")

        need(isinstance(self.model, str) and self.model != "", "model", "must be a name or a path, not empty")
        need(self.revision is None or isinstance(self.revision, str), "revision", "must be text or None")
        if isinstance(self.compilation_cache_dir, os.PathLike):
            self.compilation_cache_dir = os.fspath(self.compilation_cache_dir)
        directory = self.compilation_cache_dir
        need(directory is None or isinstance(directory, str), "compilation_cache_dir", "must be a path or None")
        for field in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "max_waiting_requests",
            "max_waiting_tokens",
        ):
            value = getattr(self, field)
            need(value is None or _whole(value), field, "must be an integer of at least 1, or None")
        need(_whole(self.page_size) and self.page_size <= 1024, "page_size", "must be an integer in [1, 1024]")
        for field in ("tensor_parallel_size", "data_parallel_size"):
            need(_whole(getattr(self, field)), field, "must be an integer of at least 1")
        need(isinstance(self.seed, int) and not isinstance(self.seed, bool), "seed", "must be an integer")
        need(-(2**63) <= self.seed < 2**64, "seed", "must be in [-2**63, 2**64)")
        restarts = self.max_engine_restarts
        whole = restarts == 0 or _whole(restarts)
        need(whole and not isinstance(restarts, bool), "max_engine_restarts", "must be an integer of at least 0")
        limit = self.engine_timeout
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        need(limit is None or (number and limit > 0), "engine_timeout", "must be above 0 seconds, or None")
        share = self.memory_utilization
        number = isinstance(share, int | float) and not isinstance(share, bool)
        need(number and 0 < share <= 1, "memory_utilization", "must be a number in (0, 1]")
        for field in ("enable_prefix_caching", "disable_custom_all_reduce", "engine_process", "warm_up"):
            need(isinstance(getattr(self, field), bool), field, "must be True or False")
        formats = ("auto", "safetensors", "orbax", "dummy")
        need(self.load_format in formats, "load_format", "must be 'auto', 'safetensors', 'orbax' or 'dummy'")
        need(self.dtype in ("auto", "float32", "bfloat16"), "dtype", "must be 'auto', 'float32' or 'bfloat16'")
        need(self.scheduling_policy in ("fcfs", "priority"), "scheduling_policy", "must be 'fcfs' or 'priority'")
        backends = "must be None, 'reference', 'xla', 'gpu' or 'tpu'"
        need(self.attention_backend in (None, "reference", "xla", "gpu", "tpu"), "attention_backend", backends)
        for field in ("token_rungs", "decode_rungs"):
            rungs = getattr(self, field)
            if rungs is not None:
                listed = isinstance(rungs, list | tuple) and all(_whole(rung) for rung in rungs)
                need(listed, field, "must be None or integers of at least 1")
                need(list(rungs) == sorted(set(rungs)), field, "must be ascending")
                setattr(self, field, tuple(rungs))

        self._check_processes(need)

    def _check_processes(self, need: Callable[[bool, str, str], None]) -> None:
        """Of the options for several processes."""
        need(_whole(self.heartbeat_timeout_seconds), "heartbeat_timeout_seconds", "must be an integer of at least 1")
        address, count, own = self.coordinator_address, self.num_processes, self.process_id
        if address is None:
            for field in ("num_processes", "process_id"):
                need(getattr(self, field) is None, field, "needs coordinator_address")
            return
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        form = host != "" and port.isdecimal() and 0 < int(port) < 65536
        need(address == "auto" or form, "coordinator_address", "must be HOST:PORT of process 0, or 'auto'")
        need(count is None or _whole(count), "num_processes", "must be an integer of at least 1")
        number = own is None or (isinstance(own, int) and not isinstance(own, bool) and own >= 0)
        need(number, "process_id", "must be an integer of at least 0")
        if address != "auto":
            for field in ("num_processes", "process_id"):
                need(
                    getattr(self, field) is not None, field, "coordinator_address needs it too, or 'auto' as its value"
                )
        if count is not None and own is not None:
            need(own < count, "process_id", f"must be below num_processes={count}")

    @property
    def num_devices(self) -> int:
        """How many devices the engine runs on."""
        return self.data_parallel_size * self.tensor_parallel_size

    @property
    def cache_directory(self) -> Path:
        """Where compiled executables are kept."""
        chosen = self.compilation_cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR")
        return Path(chosen) if chosen else Path.home() / ".cache" / "jaxllm" / "xla"


# vLLM's names of options, which `config_from` and the command line take too.
ALIASES = {
    "gpu_memory_utilization": "memory_utilization",
    "block_size": "page_size",
}
_UNQUANTIZED = "weights and cache are held in dtype"
_OWN_TOKENIZER = "the tokenizer is the model's own"
_COMPILED = "steps are always compiled; warm_up=False leaves most of them until they are needed"
# vLLM's options that are settled here: the values that ask for what is done anyway, and why there are no others.
# `config_from` takes these values and drops them.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "trust_remote_code": ((False,), "no remote code is ever run"),
    "code_revision": ((None,), "no remote code is ever run"),
    "pipeline_parallel_size": ((1,), "there are no stages; see tensor_parallel_size and data_parallel_size"),
    "enable_expert_parallel": ((False,), "experts are not dealt out; see tensor_parallel_size and data_parallel_size"),
    "distributed_executor_backend": (
        (None, "mp", "uni"),
        "one process drives a host's devices; coordinator_address joins several",
    ),
    "enforce_eager": ((False,), _COMPILED),
    "compilation_config": ((None,), _COMPILED),
    "quantization": ((None,), _UNQUANTIZED),
    "kv_cache_dtype": (("auto",), _UNQUANTIZED),
    "tokenizer": ((None,), _OWN_TOKENIZER),
    "tokenizer_revision": ((None,), _OWN_TOKENIZER),
    "tokenizer_mode": (("auto",), _OWN_TOKENIZER),
    "skip_tokenizer_init": ((False,), _OWN_TOKENIZER),
    "hf_overrides": ((None,), "the model's config.json holds"),
    "generation_config": (("auto",), "sampling defaults are those of the model's generation_config.json"),
    "task": (("auto", "generate"), "a model generates text; embed() needs no option"),
    "runner": (("auto", "generate"), "a model generates text; embed() needs no option"),
    "limit_mm_per_prompt": ((None,), "prompts are text"),
    "enable_chunked_prefill": ((True, None), "a step's budget of tokens is shared by prompts, whole or in parts"),
    "async_scheduling": ((True, None), "a step is launched before the one before it is read"),
    "enable_lora": ((False,), "there are no adapters"),
    "speculative_config": ((None,), "no tokens are guessed ahead"),
    "enable_sleep_mode": ((False,), "weights and cache stay on the devices"),
    "cpu_offload_gb": ((0,), "weights stay on the devices"),
    "swap_space": ((0,), "what is preempted is computed again"),
    "disable_log_stats": ((True,), "stats() and the server's /metrics tell them"),
}


def config_from(model: str, options: dict[str, Any]) -> EngineConfig:
    """EngineConfig(model=model, **options), where options may also have vLLM's names, see `ALIASES` and `FIXED`.

    Raises:
      ConfigError: an option is unknown (the message names its nearest match), given under both its names, or refused.
    """
    import difflib

    known = [field.name for field in dataclasses.fields(EngineConfig)]
    chosen: dict[str, Any] = {}
    for alias, value in options.items():
        name = ALIASES.get(alias, alias)
        if name in FIXED:
            values, reason = FIXED[name]
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
                raise ConfigError(f"{name}={value!r}: must be {' or '.join(map(repr, values))}, {reason}")
            continue
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *ALIASES, *FIXED], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(f"unknown option {name!r}{hint} Options: {', '.join(known)}")
        if name != alias and name in options:
            raise ConfigError(f"{alias}={value!r}: is another name of {name}, which is {options[name]!r}; give one")
        chosen[name] = value
    return EngineConfig(model=model, **chosen)
