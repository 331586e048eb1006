"""The errors that users meet. Each names the field, the value and the limit."""

# Why the engine gives a sample up whose row has no token to choose.
NO_TOKEN = "the logits hold NaN or infinity, or every token is forbidden"


class JaxllmError(Exception):
    """The root of every error that jaxllm raises on purpose."""


class Shown(str):
    """A value as it was shown where it was refused, in another process say; it is shown so again."""

    def __repr__(self) -> str:
        return str(self)


class InvalidRequestError(JaxllmError, ValueError):
    """A request that cannot be served, refused before any work starts.

    Attributes:
      field: the parameter at fault, by the name that the user typed.
      value: what was given (shortened in the message).
      limit: what is allowed, in words.
    """

    def __init__(self, field: str, value: object, limit: str):
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown}: {limit}")
        self.field, self.value, self.limit = field, value, limit


class ConfigError(JaxllmError, ValueError):
    """An engine option out of range, or options that do not fit each other."""


class ModelNotFoundError(JaxllmError, FileNotFoundError):
    """No model under that name or path."""


class UnsupportedModelError(JaxllmError, ValueError):
    """A model whose architecture, or a feature of it, jaxllm does not implement."""


class CheckpointError(JaxllmError, ValueError):
    """A checkpoint with missing, extra, misshapen or truncated tensors, or a corrupt file."""


class OutOfMemoryError(JaxllmError, MemoryError):
    """The plan does not fit: the message shows the sum and what would fit."""


class EngineDeadError(JaxllmError, RuntimeError):
    """The engine core has ended; no further request can be served."""


class QueueFullError(JaxllmError, RuntimeError):
    """More requests or tokens wait than the engine's limits allow; try again later."""
