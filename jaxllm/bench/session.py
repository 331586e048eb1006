"""An engine under measurement: opened once, with what its device allows and what its model costs."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.bench.ceilings import measure_ceilings
from jaxllm.bench.facts import Facts, gather
from jaxllm.bench.floor import Ceilings, ModelCost
from jaxllm.bench.models import bench_model, model_name
from jaxllm.checkpoint import open_checkpoint
from jaxllm.config import EngineConfig, config_from
from jaxllm.core.expected import Expected
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.engine import platform
from jaxllm.engine.client import InProcessClient
from jaxllm.engine.compile import use_compilation_cache
from jaxllm.frontend.engine import FrontEngine
from jaxllm.llm import LLM


@dataclasses.dataclass
class Session:
    """What the measurements over one engine share.

    Attributes:
      hf: the contents of the model's config.json.
      facts: what goes into files of results.
      start_seconds: from `LLM(...)` to ready; `warm_up_seconds` the compilation of everything after that.
    """

    llm: LLM
    cost: ModelCost
    hf: dict[str, Any]
    facts: Facts
    start_seconds: float
    warm_up_seconds: float

    @property
    def vocab_size(self) -> int:
        return self.hf["vocab_size"]

    @property
    def ceilings(self) -> Ceilings | None:
        """Of all the engine's devices together."""
        return self.facts.ceilings

    @property
    def engine(self) -> FrontEngine:
        """What another front door can stand on, while `llm` does nothing."""
        return self.llm._engine

    @property
    def core(self) -> Any:
        """The engine core, which must be in this process: its plan and its executables are measured too."""
        client = self.llm._client
        assert isinstance(client, InProcessClient)
        return client._core


def greedy(num_tokens: int) -> SamplingParams:
    """Exactly so many tokens, without text."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def model_cost(config: EngineConfig) -> tuple[ModelCost, dict[str, Any]]:
    """What the model costs in the run's dtype, and the contents of its config.json."""
    from jaxllm.engine.resolve import resolve_dtype
    from jaxllm.models.registry import model_class

    hf = open_checkpoint(config.model, config.revision).config
    windows = model_class(hf).parse_config(hf).windows
    return ModelCost.from_config(hf, resolve_dtype(config).itemsize, windows), hf


@contextlib.contextmanager
def open_session(
    model: str,
    options: dict[str, Any],
    *,
    prompt_length: int = 128,
    ceilings: bool | Ceilings = True,
    warm_up: bool = True,
    progress: bool = False,
    commit: str | None = None,
    check: Callable[[LLM, int], None] | None = None,
) -> Iterator[Session]:
    """Measures the device, starts an engine and compiles all that it needs, so that no run meets a compilation.

    Args:
      model: anything that `LLM` takes, or "shape:NAME".
      options: of `EngineConfig`.
      prompt_length: of the first request expected.
      ceilings: measure the copy bandwidth and the GEMM rate first; or those of one device, measured already.
      warm_up: compile everything; otherwise the first run meets compilations.
      progress: draw a bar while the weights load.
      commit: see `jaxllm.bench.facts.gather`.
      check: called with the engine and its vocabulary's size, before everything is compiled; may refuse by raising.

    Raises any of `jaxllm.errors`.
    """
    import jax

    set_options = dict(options)
    with bench_model(model, options) as (path, options):
        config = config_from(path, options)
        platform.configure(config.num_devices)  # before a ceiling is measured: JAX takes its share of the memory then
        use_compilation_cache(config.cache_directory)  # JAX takes no other once it has compiled something
        cost, hf = model_cost(config)
        num_devices = config.num_devices
        one = measure_ceilings(cost.itemsize) if ceilings is True else ceilings or None
        facts = gather(
            model_name(model),
            set_options,
            device=jax.devices()[0].device_kind,
            num_devices=num_devices,
            dtype={2: "bfloat16", 4: "float32"}[cost.itemsize],
            ceilings=one and Ceilings(one.bandwidth * num_devices, one.flops * num_devices),
            commit=commit,
        )
        begin = time.perf_counter()
        with LLM(path, expected=Expected(prompt_length), progress=progress, **options) as llm:
            start_seconds = time.perf_counter() - begin
            if check is not None:
                check(llm, hf["vocab_size"])
            ready = time.perf_counter()
            if warm_up:
                llm.warm_up()
            yield Session(llm, cost, hf, facts, start_seconds, time.perf_counter() - ready)
