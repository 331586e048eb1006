"""A workload's steps, as the engine's own scheduler makes them."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from jaxllm.core.batch import Batch
from jaxllm.core.kv_cache import CacheGroup, KVCache
from jaxllm.core.request import Request
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.core.scheduler import Scheduler, SchedulerConfig
from jaxllm.engine.executables import row_rungs
from jaxllm.plan.times import Step


def steps(
    requests: Sequence[tuple[list[int], int]],
    config: SchedulerConfig,
    groups: Sequence[CacheGroup],
    decode_rungs: Sequence[int],
) -> Iterator[Step]:
    """The steps of (prompt token ids, tokens to generate), all there from the start, on one rank.

    One step is launched before the one before is read, as the engine does.
    """
    cache = KVCache(groups)
    scheduler = Scheduler(config, cache)
    for number, (prompt, count) in enumerate(requests):
        request = Request(
            id=str(number),
            tokens=list(prompt),
            num_prompt_tokens=len(prompt),
            params=SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True),
            max_tokens=count,
            stop_token_ids=frozenset(),
            seed=0,
        )
        cache.name_pages(request)
        scheduler.add(request)
    previous: Batch | None = None
    while scheduler.has_work:
        batch = scheduler.schedule(0.0)
        if batch is not None:
            yield _step(batch, config, cache, decode_rungs)
        if previous is not None:
            scheduler.finish(previous, [0 if row.samples else [] for row in previous.rows])
        previous = batch


def _step(batch: Batch, config: SchedulerConfig, cache: KVCache, decode_rungs: Sequence[int]) -> Step:
    spans = [(row.start, row.start + row.length) for row in batch.rows if row.length > 1]
    singles = [row for row in batch.rows if row.length == 1]
    contexts = [row.start + 1 for row in singles]
    num_sampled = sum(row.samples for row in batch.rows)
    rungs = config.token_rungs if spans or not decode_rungs else decode_rungs
    shared = 0
    if cache.num_hit_tokens:  # else nobody holds another's pages
        tables = [row.request.pages.tables[0] for row in singles if row.request.pages is not None]
        pages = [page for table in tables for page in table if page]
        shared = (len(pages) - len(set(pages))) * cache.page_size
    rows = row_rungs(config.max_num_seqs, decode_rungs)
    return Step(
        spans,
        contexts,
        num_sampled,
        shared,
        num_padded=rungs[bisect_left(rungs, batch.num_tokens)],
        num_sampled_padded=rows[bisect_left(rows, num_sampled)] if num_sampled else 0,
    )
