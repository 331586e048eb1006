"""Embeddings: the last hidden rows of pooling requests, read beside the tokens that nobody wants."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.engine.device import Device, begin_read
from jaxllm.engine.executables import POOL_ROWS
from jaxllm.engine.results import StepResult


@dataclasses.dataclass(slots=True)
class PoolRead:
    """Hidden rows under way, and whose they are: (rank, row)."""

    owners: list[tuple[int, int]]
    rows: jax.Array


def launch_pooling(device: Device, batches: Sequence[Batch | None], num_slots: int) -> list[PoolRead]:
    """Starts to read the last hidden rows of the batch's pooling requests whose prompts end in this step; the device
    has `num_slots` for each rank."""
    owners = [
        (rank, index)
        for rank, batch in enumerate(batches)
        for index, row in enumerate(batch.rows if batch else [])
        if row.samples and row.request.pooling
    ]
    reads = []
    for begin in range(0, len(owners), POOL_ROWS):
        part = owners[begin : begin + POOL_ROWS]
        index = np.zeros(POOL_ROWS, np.int32)
        index[: len(part)] = [rank * num_slots + row for rank, row in part]
        rows = device.pool(index)
        begin_read(rows)
        reads.append(PoolRead(part, rows))
    return reads


def read_pooling(device: Device, reads: Sequence[PoolRead], results: Sequence[StepResult]) -> None:
    """Waits for what `launch_pooling` has started and puts it into the rows' details."""
    for read in reads:
        (rows,) = device.read(read.rows)
        for at, (rank, row) in enumerate(read.owners):
            results[rank].detail(row).embedding = rows[at]
