"""An engine under measurement: opened once, with what its device allows and what its model costs."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxllm.bench.ceilings import measure_ceilings
from jaxllm.bench.floor import Ceilings, ModelCost
from jaxllm.bench.models import bench_model
from jaxllm.checkpoint import open_checkpoint
from jaxllm.config import EngineConfig, config_from
from jaxllm.core.expected import Expected
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.llm import LLM


@dataclasses.dataclass
class Session:
    """What one run of `jaxllm bench` shares.

    Attributes:
      device, num_devices: JAX's name of the device, and how many the engine uses.
      ceilings: of all these devices together; None if they were not measured.
      start_seconds: from `LLM(...)` to ready; `warm_up_seconds` the compilation of everything after that.
    """

    llm: LLM
    cost: ModelCost
    vocab_size: int
    device: str
    num_devices: int
    dtype: str
    ceilings: Ceilings | None
    start_seconds: float
    warm_up_seconds: float

    def facts(self) -> dict[str, Any]:
        """What stays the same over the run's results, for JSON."""
        import jax

        ceilings = self.ceilings
        return {
            "device": self.device,
            "num_devices": self.num_devices,
            "dtype": self.dtype,
            "jax": jax.__version__,
            "copy_bandwidth_bytes_s": ceilings and ceilings.bandwidth,
            "gemm_flop_s": ceilings and ceilings.flops,
            "start_seconds": self.start_seconds,
            "warm_up_seconds": self.warm_up_seconds,
        }


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
    ceilings: bool = True,
    warm_up: bool = True,
    progress: bool = False,
    check: Callable[[LLM, int], None] | None = None,
) -> Iterator[Session]:
    """Measures the device, starts an engine and compiles all that it needs, so that no run meets a compilation.

    Args:
      model: anything that `LLM` takes, or "shape:NAME".
      options: of `EngineConfig`.
      prompt_length: of the first request expected.
      ceilings: measure the copy bandwidth and the GEMM rate first.
      warm_up: compile everything; otherwise the first run meets compilations.
      progress: draw a bar while the weights load.
      check: called with the engine and its vocabulary's size, before everything is compiled; may refuse by raising.

    Raises any of `jaxllm.errors`.
    """
    import jax

    with bench_model(model, options) as (path, options):
        config = config_from(path, options)
        cost, hf = model_cost(config)
        num_devices = config.data_parallel_size * getattr(config, "tensor_parallel_size", 1)
        found = measure_ceilings(cost.itemsize) if ceilings else None
        if found is not None:
            found = Ceilings(found.bandwidth * num_devices, found.flops * num_devices)
        begin = time.perf_counter()
        with LLM(path, expected=Expected(prompt_length), progress=progress, **options) as llm:
            start_seconds = time.perf_counter() - begin
            if check is not None:
                check(llm, hf["vocab_size"])
            ready = time.perf_counter()
            if warm_up:
                llm.warm_up()
            yield Session(
                llm,
                cost,
                hf["vocab_size"],
                jax.devices()[0].device_kind,
                num_devices,
                {2: "bfloat16", 4: "float32"}[cost.itemsize],
                found,
                start_seconds,
                time.perf_counter() - ready,
            )
