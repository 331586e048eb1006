"""Logprobs of prompts and of more alternatives than the sampler reports: rare, row-chunked, with executables of their
own, since float32 logits of a whole step over a whole vocabulary take gigabytes."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.engine.device import Device, WideLogprobs
from jaxllm.engine.executables import WIDE_ROWS
from jaxllm.engine.grammars import StepMasks
from jaxllm.engine.results import StepResult, TokenLogprobs
from jaxllm.engine.sampling import MAX_LOGPROBS, is_wide

Owner = tuple[int, int, int | None]  # rank, row, position of a prompt's token or None for the sampled one


@dataclasses.dataclass(slots=True)
class WideRead:
    """Wide logprobs under way, and whose they are."""

    owners: list[Owner]
    result: WideLogprobs


@dataclasses.dataclass(frozen=True, slots=True)
class WideSizes:
    """What places a row in the step's arrays: sampled rows and slots a rank, tokens a rank, the vocabulary."""

    num_rows: int
    num_slots: int
    num_tokens: int
    vocab_size: int


def scores_prompts(batches: Sequence[Batch | None]) -> bool:
    """Whether a row has prompt tokens whose logprobs are asked for."""
    return any(
        row.request.params.prompt_logprobs is not None and row.start + 1 < row.request.num_prompt_tokens
        for batch in batches
        for row in (batch.rows if batch else [])
    )


def launch_wide(device: Device, batches: Sequence[Batch | None], output: jax.Array, sizes: WideSizes) -> list[WideRead]:
    """Starts the logprobs of the rows that ask for more than the sampler reports."""
    sampled: dict[int, list[tuple[Owner, int]]] = {}
    prompts: dict[int, list[tuple[Owner, int, int]]] = {}
    for rank, batch in enumerate(batches):
        at = rank * sizes.num_tokens
        for index, row in enumerate(batch.rows if batch else []):
            params = row.request.params
            if row.samples and is_wide(params.logprobs):
                owner = (rank, index, None)
                sampled.setdefault(sizes.vocab_size, []).append((owner, rank * sizes.num_rows + index))
            if params.prompt_logprobs is not None:
                k = sizes.vocab_size if is_wide(params.prompt_logprobs) else MAX_LOGPROBS
                listed = prompts.setdefault(min(k, sizes.vocab_size), [])
                for position in range(row.start + 1, min(row.start + row.length + 1, row.request.num_prompt_tokens)):
                    source = at + position - 1 - row.start
                    listed.append(((rank, index, position), source, row.request.tokens[position]))
            at += row.length
    reads = []
    for k, chosen in sampled.items():
        for part in _chunks(chosen):
            at_rows = np.asarray([at for _, at in part])
            # Waits for the step: the price of a rare request, which saves an executable a batch shape.
            targets = device.read(output)[0][at_rows, 0]
            hidden_rows = at_rows // sizes.num_rows * sizes.num_slots + at_rows % sizes.num_rows
            run = device.wide(k, True, _padded(hidden_rows), _padded(targets))
            reads.append(WideRead([owner for owner, _ in part], run))
    for k, asked in prompts.items():
        for entries in _chunks(asked):
            owners, sources, tokens = zip(*entries, strict=True)
            run = device.wide(k, False, _padded(np.asarray(sources)), _padded(np.asarray(tokens)))
            reads.append(WideRead(list(owners), run))
    return reads


def read_wide(
    device: Device,
    reads: Sequence[WideRead],
    batches: Sequence[Batch | None],
    results: Sequence[StepResult],
    masks: StepMasks | None = None,
) -> None:
    """Waits for what `launch_wide` has started and puts it into the rows' details. `masks`: the step's, if any."""
    for wide in reads:
        logprob, rank_, ids, tops = device.read(*wide.result)
        for at, (rank, row, position) in enumerate(wide.owners):
            batch = batches[rank]
            assert batch is not None
            params = batch.rows[row].request.params
            asked = params.logprobs if position is None else params.prompt_logprobs
            count = ids.shape[1] if asked in (-1, None) else min(asked, ids.shape[1])
            one = float(logprob[at]), int(rank_[at]), ids[at], tops[at]
            allowed = masks.allowed(rank, batch.rows[row].slot) if masks is not None and position is None else None
            if allowed is not None:
                one = _among_allowed(*one, allowed)
            entry = TokenLogprobs(one[0], one[1], one[2][:count].tolist(), one[3][:count].tolist())
            detail = results[rank].detail(row)
            if position is None:
                detail.logprobs = [entry]
            else:
                detail.prompt_logprobs.append((position, entry))


def _among_allowed(
    logprob: float, rank: int, ids: np.ndarray, values: np.ndarray, allowed: np.ndarray
) -> tuple[float, int, np.ndarray, np.ndarray]:
    """Logprobs of the whole vocabulary, most likely first, as they are if all but the allowed tokens are left out."""
    keep = allowed[ids]
    total = np.logaddexp.reduce(values[keep].astype(np.float64))
    rank = 1 + int(np.count_nonzero(values[keep] > logprob))
    ids = np.concatenate([ids[keep], np.sort(ids[~keep])])
    values = np.concatenate([values[keep] - total, np.full(np.count_nonzero(~keep), -np.inf)])
    return logprob - float(total), rank, ids, values


def _chunks[T](entries: list[T]) -> Iterator[list[T]]:
    for begin in range(0, len(entries), WIDE_ROWS):
        yield entries[begin : begin + WIDE_ROWS]


def _padded(values: np.ndarray) -> np.ndarray:
    return np.pad(values.astype(np.int32), (0, WIDE_ROWS - len(values)))
