"""What the engine core and its clients say to each other: plain dataclasses, sent as msgpack."""

import dataclasses
from typing import Any

import msgspec

from jaxllm.core.sampling_params import SamplingParams


@dataclasses.dataclass(slots=True)
class AddRequest:
    """A checked request. See `jaxllm.core.request.Request` for the fields' meaning.

    `output_token_ids` are tokens already emitted elsewhere: generation continues exactly after them.
    `bad_words` are the token sequences of `params.bad_words`. `admitted`: a core before this one had let it in already,
    so that bounds of the queue do not hold for it.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_token_ids: list[int]
    seed: int
    arrival: float
    output_token_ids: list[int] = dataclasses.field(default_factory=list)
    bad_words: list[list[int]] = dataclasses.field(default_factory=list)
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    leader: str | None = None
    pooling: bool = False
    admitted: bool = False


@dataclasses.dataclass(slots=True)
class Finish:
    """Ends requests from outside: "abort", or "stop" where a stop string was found. Unknown ids are ignored."""

    ids: list[str]
    reason: str = "abort"


@dataclasses.dataclass(slots=True)
class Utility:
    """Calls one of the core's named utilities, answered by UtilityResult with the same `call`."""

    call: int
    name: str


@dataclasses.dataclass(slots=True)
class Close:
    """The last message: the core is to end. A client that goes without it has been lost."""


@dataclasses.dataclass(slots=True)
class Logprobs:
    """Logprobs of one token and of the most likely ones at its position."""

    token: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclasses.dataclass(slots=True)
class SequenceOutput:
    """What one step brought for one request.

    `embedding` is the last hidden row of a pooling request, float32 in this machine's byte order.

    `prompt_logprobs` come once, with the first output, for prompt positions from 1 on.
    `queue_time` is how many seconds passed between the request's arrival and its first step.
    `finish_reason` is "stop", "length", "abort" or "error"; `error` says what went wrong. A refused request brings
    `refused`, (field, value, limit), or `queue_full`.
    """

    id: str
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0
    queue_time: float = 0.0
    embedding: bytes | None = None
    error: str | None = None
    refused: tuple[str, str, str] | None = None
    queue_full: bool = False


@dataclasses.dataclass(slots=True)
class StepOutputs:
    """All of a step's outputs. Most rows bring one token and nothing else to say: these are `tokens`, by `ids`."""

    outputs: list[SequenceOutput]
    ids: list[str] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class UtilityResult:
    """The answer to Utility: `value`, or `error` if it failed."""

    call: int
    value: Any = None
    error: str | None = None


@dataclasses.dataclass(slots=True)
class Ready:
    """The core's first message: what the front needs to know of the engine."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    num_cache_tokens: int


@dataclasses.dataclass(slots=True)
class Dead:
    """The core's last message: it failed with `error` of type `kind`, and cannot go on."""

    kind: str
    error: str


ToCore = AddRequest | Finish | Utility
FromCore = StepOutputs | UtilityResult | Ready | Dead

_TO = {"add": AddRequest, "finish": Finish, "utility": Utility, "close": Close}
_FROM = {"outputs": StepOutputs, "result": UtilityResult, "ready": Ready, "dead": Dead}
_NAMES = {kind: name for name, kind in {**_TO, **_FROM}.items()}
_encoder = msgspec.msgpack.Encoder()
_envelope = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


def encode(message: ToCore | Close | FromCore) -> bytes:
    """msgpack of [kind, message]."""
    return _encoder.encode((_NAMES[type(message)], message))


def decode(data: bytes) -> Any:
    """Inverse of `encode`, checked field by field. Raises msgspec.DecodeError for what is not a message."""
    try:
        name, raw = _envelope.decode(data)
        kind = _TO.get(name) or _FROM.get(name)
        if kind is None:
            raise msgspec.ValidationError(f"unknown message {name!r}")
        return msgspec.msgpack.decode(raw, type=kind)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error
