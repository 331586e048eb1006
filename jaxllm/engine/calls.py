"""Calls of a device's methods as bytes: names, numbers, arrays and the keys of executables; nothing that runs code."""

import dataclasses
from typing import Any

import msgspec
import numpy as np

from jaxllm.engine import executables
from jaxllm.errors import EngineDeadError

_KEYS = {
    kind.__name__: kind
    for kind in (
        executables.Forward,
        executables.Stage,
        executables.Sample,
        executables.MakeTables,
        executables.Upload,
        executables.WriteMasks,
        executables.UpdatePages,
        executables.Wide,
        executables.Pool,
    )
}
_ARRAY, _KEY = 1, 2


def encode(kind: str, content: Any) -> bytes:
    """msgpack of [kind, content], where content may hold arrays and keys in lists and tuples."""
    return msgspec.msgpack.encode((kind, _plain(content)))


def decode(data: bytes) -> tuple[str, Any]:
    """Inverse of `encode`; tuples become lists. Raises EngineDeadError for what is none of it."""
    try:
        kind, content = msgspec.msgpack.decode(data, ext_hook=_extension)
    except (msgspec.DecodeError, ValueError, KeyError, TypeError) as error:
        raise EngineDeadError(f"a message that is none of jaxllm's: {error}") from error
    return kind, content


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        content = (value.dtype.str, value.shape, np.ascontiguousarray(value).data.cast("B") if value.size else b"")
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode(content))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return msgspec.msgpack.Ext(_KEY, msgspec.msgpack.encode((type(value).__name__, value)))
    return value


def _extension(code: int, data: memoryview) -> Any:
    if code == _ARRAY:
        dtype, shape, content = msgspec.msgpack.decode(data)
        return np.frombuffer(content, dtype).reshape(shape)
    name, fields = msgspec.msgpack.decode(data)
    return msgspec.convert(fields, type=_KEYS[name])
