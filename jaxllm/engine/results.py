"""What a step brought, read from the one array that the sampler returns."""

import dataclasses

import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.engine.sampling import is_wide
from jaxllm.engine.step import OUTPUT_COLUMNS


@dataclasses.dataclass(slots=True)
class TokenLogprobs:
    """One position's logprobs: of its token (with its rank, 1 = most likely), and of the most likely tokens."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclasses.dataclass(slots=True)
class RowDetail:
    """What a step brought for a row beside its tokens.

    Attributes:
      logprobs: one a token, if asked for.
      prompt_logprobs: (position, logprobs) of prompt tokens, where asked for.
      embedding: float32[embed], the last hidden row of a pooling request.
      finite: False if the row's logits held NaN or infinity, or no token was left to choose.
    """

    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[tuple[int, TokenLogprobs]] = dataclasses.field(default_factory=list)
    embedding: np.ndarray | None = None
    finite: bool = True


@dataclasses.dataclass(slots=True)
class StepResult:
    """What a step brought for one rank.

    Attributes:
      tokens: each row's new token; [] for rows that do not sample.
      details: of the rows that have any, by index.
    """

    tokens: list[int | list[int]]
    details: dict[int, RowDetail]

    def detail(self, row: int) -> RowDetail:
        """The row's detail, made if there is none."""
        return self.details.setdefault(row, RowDetail())


def read_rank(output: np.ndarray, batch: Batch) -> StepResult:
    """output: int32[at least the rows, OUTPUT_COLUMNS + 2 N], see `jaxllm.engine.step.pack_output`."""
    rows = batch.rows
    output = output[: len(rows)]
    finite = output[:, 4]
    result = StepResult(output[:, 0].tolist(), {})
    for index in range(batch.num_fed, len(rows)):
        if not rows[index].samples:
            result.tokens[index] = []
    if not finite.all():
        for index in np.flatnonzero(finite == 0).tolist():
            if rows[index].samples:
                result.tokens[index] = []
                result.detail(index).finite = False
    width = (output.shape[1] - OUTPUT_COLUMNS) // 2
    if width:
        floats = output.view(np.float32)
        for index, row in enumerate(rows):
            asked = row.request.params.logprobs
            if asked is not None and row.samples and not is_wide(asked):
                ids = output[index, OUTPUT_COLUMNS : OUTPUT_COLUMNS + min(asked, width)].tolist()
                start = OUTPUT_COLUMNS + width
                tops = floats[index, start : start + min(asked, width)].tolist()
                entry = TokenLogprobs(float(floats[index, 2]), int(output[index, 3]), ids, tops)
                result.detail(index).logprobs = [entry]
    return result
