"""`jaxllm bench all`: every part of a report over one model, with one engine and one warm-up.

Each result is on disk when the next begins, so that a run may be killed at any moment. A part that fails is told and
does not take the others with it.
"""

import asyncio
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.bench.attention import measure_attention
from jaxllm.bench.busy import measure_busy
from jaxllm.bench.ceilings import measure_ceilings
from jaxllm.bench.facts import Facts, gather
from jaxllm.bench.floor import Ceilings
from jaxllm.bench.memory import measure_memory
from jaxllm.bench.models import bench_model, model_name
from jaxllm.bench.parity import measure_parity
from jaxllm.bench.results import Part, path_of, save
from jaxllm.bench.serve import InProcess, ServeWork, serve_rates
from jaxllm.bench.session import Session, open_session
from jaxllm.bench.start import StartResult, measure_start
from jaxllm.bench.throughput import choose_workloads, run_throughput, workload
from jaxllm.errors import InvalidRequestError

# In the order in which they run. `start` needs the device for other processes, `parity` the memory for engines of its
# own; `serve` ends the engine.
PARTS = ("start", "parity", "ceilings", "attention", "memory", "throughput", "busy", "serve")
_OVER_AN_ENGINE = {"memory", "throughput", "busy", "serve"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What to measure.

    Attributes:
      model, options: see `jaxllm.bench.session.open_session`; the engine core stays in this process.
      output: the directory of the files of results; made if it is not there.
      parts: some of `PARTS`.
      workloads: for throughput; none means all of this kind of device that fit.
      runs: of each workload, of which the fastest counts.
      busy: workloads that run under the profiler; none means decode_heavy, on a CPU cpu_ragged.
      serve: what arrives.
      warm_up: compile everything before measuring.
      commit: see `jaxllm.bench.facts.gather`.
      progress: draw a bar while weights load.

    Raises:
      InvalidRequestError: an unknown part or workload.
    """

    model: str
    options: dict[str, Any]
    output: Path
    parts: Sequence[str] = PARTS
    workloads: Sequence[str] = ()
    runs: int = 2
    busy: Sequence[str] = ()
    serve: ServeWork = dataclasses.field(default_factory=lambda: ServeWork(rates=(4.0, 12.0, 20.0, 28.0), runs=3))
    warm_up: bool = True
    commit: str | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise InvalidRequestError("only", part, f"must be one of {', '.join(PARTS)}")
        for name in (*self.workloads, *self.busy):
            workload(name, 1000)


class _Run:
    """One run of a suite: what it has found so far, and where that goes."""

    def __init__(self, suite: Suite, say: Callable[[str], None], done: Callable[[Part], None]):
        self.suite, self.say, self._done = suite, say, done
        self.ceilings: Ceilings | None = None  # of one device
        self.failed: list[str] = []

    def save(self, part: str, facts: Facts, results: Sequence[Any]) -> None:
        save(path_of(self.suite.output, facts, part), part, facts, results)

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """What fails in it is told, and the run goes on."""
        try:
            yield
        except Exception as error:
            if name not in self.failed:
                self.failed.append(name)
            self.say(f"{name} has failed: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Callable[[Facts, Sequence[Any]], None]]:
        """A part's whole life; the block calls what it gets with all results so far, after each."""
        latest: list[Part] = []

        def keep(facts: Facts, results: Sequence[Any]) -> None:
            self.save(name, facts, results)
            latest[:] = [Part(name, facts, list(results))]

        self.say(f"{name} ...")
        with self.guard(name):
            yield keep
        if latest:
            self._done(latest[0])

    def start(self, cache: Path) -> None:
        suite, results = self.suite, list[StartResult]()
        with self.part("start") as keep:
            for found in ("empty", "full"):
                report = measure_start(suite.model, suite.options, cache, found)
                results.append(report.result)
                facts = gather(
                    model_name(suite.model),
                    suite.options,
                    device=report.device,
                    num_devices=report.num_devices,
                    dtype=report.dtype,
                    commit=suite.commit,
                )
                keep(facts, results)

    def kernels(self, options: dict[str, Any]) -> None:
        """What needs the device and no engine. The ceilings are measured for the others' sake too."""
        import jax

        from jaxllm.bench.session import model_cost
        from jaxllm.config import config_from
        from jaxllm.engine import platform
        from jaxllm.engine.compile import use_compilation_cache
        from jaxllm.engine.resolve import resolve_backend, resolve_dtype

        suite = self.suite
        with bench_model(suite.model, options) as (path, made):
            config = config_from(path, made)
            platform.configure(config.num_devices)
            use_compilation_cache(config.cache_directory)  # JAX takes no other once it has compiled something
            cost, hf = model_cost(config)
            self.ceilings = measure_ceilings(cost.itemsize)
            dtype = resolve_dtype(config)
            device = jax.devices()[0].device_kind
            facts = gather(
                model_name(suite.model),
                options,
                device=device,
                num_devices=1,
                dtype=dtype.name,
                ceilings=self.ceilings,
                commit=suite.commit,
            )
            if "parity" in suite.parts:
                with self.part("parity") as keep:
                    keep(facts, [measure_parity(suite.model, options)])
            if "ceilings" in suite.parts:
                with self.part("ceilings") as keep:
                    keep(facts, [self.ceilings])
            if "attention" in suite.parts:
                results: list[Any] = []
                with self.part("attention") as keep:
                    for result in measure_attention(
                        hf,
                        backend=resolve_backend(config),
                        dtype=dtype,
                        page_size=config.page_size,
                        ceilings=self.ceilings,
                    ):
                        results.append(result)
                        keep(facts, results)

    def over(self, session: Session) -> None:
        """What runs over one engine."""
        suite, facts = self.suite, session.facts
        limit = session.llm.max_model_len
        memory: list[Any] = []

        def remember(after: str) -> None:
            if "memory" in suite.parts:
                with self.guard("memory"):
                    memory.append(measure_memory(session, after))
                    self.save("memory", facts, memory)

        remember("warm-up" if suite.warm_up else "start")
        names: list[str] = []
        if "throughput" in suite.parts:
            with self.part("throughput") as keep:
                names, left_out = choose_workloads(suite.workloads, session.vocab_size, limit, on_cpu=_on_cpu())
                for reason in left_out.values():
                    self.say(f"left out: {reason}")
                results = []
                for name in names:
                    results.append(run_throughput(session, name, suite.runs))
                    keep(facts, results)
                    self.say(f"{name}: {results[-1].seconds:.3f} s")
            remember("throughput")
        if "busy" in suite.parts:
            with self.part("busy") as keep:
                traced = []
                for name in suite.busy or ["cpu_ragged" if _on_cpu() else "decode_heavy"]:
                    traced.append(measure_busy(session, name))
                    keep(facts, traced)
        if "serve" in suite.parts:
            with self.part("serve") as keep:
                asyncio.run(_serve(session, suite.serve, lambda results: keep(facts, results)))
                remember("serve")
        if memory:
            self._done(Part("memory", facts, memory))


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


async def _serve(session: Session, work: ServeWork, on_result: Callable[[list], None]) -> None:
    from jaxllm.async_llm import AsyncLLM

    async with AsyncLLM(engine=session.engine) as llm:
        await serve_rates(InProcess(llm), work, on_result)


def run_suite(suite: Suite, say: Callable[[str], None], done: Callable[[Part], None]) -> list[str]:
    """Runs the parts and writes DEVICE-MODEL-PART.json of each.

    Args:
      say: told of progress, a line at a time.
      done: called with each part that has ended with results.

    Returns:
      the parts that failed.

    Raises any of `jaxllm.errors` if the engine does not start.
    """
    suite.output.mkdir(parents=True, exist_ok=True)
    run = _Run(suite, say, done)
    options = suite.options
    with contextlib.ExitStack() as stack:
        if "start" in suite.parts:
            cache = Path(tempfile.mkdtemp(prefix="jaxllm-bench-"))
            stack.callback(shutil.rmtree, cache, ignore_errors=True)
            run.start(cache)
            # What these processes have compiled serves this one.
            options = {"compilation_cache_dir": str(cache), **options}
        if set(suite.parts) <= {"start"}:
            return run.failed
        run.kernels(options)
        if _OVER_AN_ENGINE & set(suite.parts):
            with open_session(
                suite.model,
                {"warm_up": suite.warm_up, **options},
                ceilings=run.ceilings or True,
                warm_up=suite.warm_up,
                progress=suite.progress,
                commit=suite.commit,
            ) as session:
                run.say(f"ready in {session.start_seconds:.1f} s, all compiled {session.warm_up_seconds:.1f} s later")
                run.over(session)
    return run.failed
