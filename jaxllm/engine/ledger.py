"""Which requests a core has not finished yet, and what it would take to go on with them in another one."""

import dataclasses
from collections.abc import Iterable

from jaxllm.engine.messages import AddRequest, FromCore, SequenceOutput, StepOutputs

MAX_DEATHS = 2  # of cores, that a request may be in when they die, until it is taken for the cause


@dataclasses.dataclass(slots=True)
class _Entry:
    """An unfinished request.

    Attributes:
      request: as it was submitted.
      tokens: that its core, or those before, have brought.
      sent: whether a core has it, as far as is known here.
      aborted: a core has been told to end it, and has not confirmed that yet.
      deaths: cores that died with it.
    """

    request: AddRequest
    sent: bool
    tokens: list[int] = dataclasses.field(default_factory=list)
    aborted: bool = False
    deaths: int = 0

    def replay(self) -> AddRequest:
        """The request from where it stands: all that penalties, limits and a grammar need follows from its tokens, and
        randomness depends on their positions alone."""
        params = self.request.params
        if self.tokens and params.prompt_logprobs is not None:  # they came with the first token
            params = dataclasses.replace(params, prompt_logprobs=None)
        return dataclasses.replace(
            self.request,
            params=params,
            output_token_ids=self.request.output_token_ids + self.tokens,
            admitted=self.sent,
        )


class Ledger:
    """Follows requests by what is sent to a core and what comes from it. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}  # in the order of their submission

    def __len__(self) -> int:
        return len(self._entries)

    def submit(self, request: AddRequest, sent: bool) -> None:
        """Notes a new request; sent: a core gets it now."""
        self._entries[request.id] = _Entry(request, sent)

    def finish(self, ids: Iterable[str], reason: str, sent: bool) -> list[SequenceOutput]:
        """Notes that requests are ended from outside; sent: a core is told. If not, the outputs that it would bring."""
        ended = []
        for name in ids:
            entry = self._entries.get(name)
            if entry is None:
                continue
            if reason == "abort" and sent:
                entry.aborted = True  # it ends when the core says so
                continue
            del self._entries[name]
            if reason == "abort":
                ended.append(SequenceOutput(name, [], finish_reason="abort"))
        return ended

    def note(self, messages: Iterable[FromCore]) -> None:
        """Takes in what the core has brought."""
        entries = self._entries
        for message in messages:
            if not isinstance(message, StepOutputs):
                continue
            for output in message.outputs:
                entry = entries.get(output.id)
                if entry is None:
                    continue
                if entry.deaths and entry.tokens:
                    output.num_cached_tokens = 0  # what was true of its first core has been told
                if output.finish_reason is not None:
                    del entries[output.id]
                else:
                    entry.tokens += output.token_ids
            for name, token in zip(message.ids, message.tokens, strict=True):
                entry = entries.get(name)
                if entry is not None:
                    entry.tokens.append(token)

    def core_died(self) -> list[SequenceOutput]:
        """Notes the death of the core; the outputs of requests that end by it. The others wait for `replays`."""
        ended = []
        for name, entry in list(self._entries.items()):
            if not entry.sent:
                continue
            entry.deaths += 1
            if entry.aborted:
                ended.append(SequenceOutput(name, [], finish_reason="abort"))
            elif entry.deaths >= MAX_DEATHS:
                error = f"the engine died {entry.deaths} times while it served this request, which may be the cause"
                ended.append(SequenceOutput(name, [], finish_reason="error", error=error))
            else:
                continue
            del self._entries[name]
        return ended

    def replays(self) -> list[AddRequest]:
        """All unfinished requests as a new core gets them now, in the order of their submission."""
        requests = []
        for entry in self._entries.values():
            requests.append(entry.replay())
            entry.sent = True
        return requests
