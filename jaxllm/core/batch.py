"""What the scheduler hands to the runner: one step's work on one data-parallel rank."""

import dataclasses

from jaxllm.core.request import Request


@dataclasses.dataclass(slots=True)
class Row:
    """One request's share of a step.

    Attributes:
      request: whose tokens these are.
      slot: `request.slot` when scheduled (the request may lose it before the step is read).
      start: position of the first token to compute.
      length: how many tokens to compute, at least 1.
      samples: the row catches up with all tokens, so its last one yields a new token.
      epoch: `request.num_preemptions` when scheduled; differs from it once the request has lost the row's pages.
    Tokens from `len(request.tokens)` on are not known on the host: the device feeds them from its own history.
    """

    request: Request
    slot: int
    start: int
    length: int
    samples: bool
    epoch: int = 0


@dataclasses.dataclass(slots=True)
class Batch:
    """Rows of one query token stand first. Of these, the first `num_fed` compute a token that only the device knows as
    yet, and sample the next one: the decodes of a step that overlaps the one before.

    `new_slots` tells which rows' requests have just been given their slot: the runner uploads what such a slot needs
    (sampling parameters, token history, masks).

    `page_updates[g]` lists (slot, index, page): entry `index` of the slot's page table in cache group g is now `page`.
    They include every page of a newly admitted request; entries of released pages (0) need not be sent.
    """

    rows: list[Row]
    new_slots: list[int]  # indices into rows
    page_updates: list[list[tuple[int, int, int]]]
    num_tokens: int
    num_fed: int = 0
