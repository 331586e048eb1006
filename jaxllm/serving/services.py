"""What every endpoint works with."""

import dataclasses
import time

from jaxllm.async_llm import AsyncLLM
from jaxllm.serving.admission import Admission
from jaxllm.serving.auth import ApiKeys
from jaxllm.serving.config import ServerConfig
from jaxllm.serving.errors import ApiError
from jaxllm.serving.heartbeat import Heartbeat
from jaxllm.serving.metrics import Metrics
from jaxllm.serving.tracing import Tracing


@dataclasses.dataclass
class Services:
    """One server's parts.

    Attributes:
      names: the model's names; answers carry the one that was asked for, or the first.
      keys, admin_keys: who may use the API, and who the admin routes.
      chat_template: Jinja source in place of the model's own; None for that.
      tracing: where spans go; None for nowhere.
      created: Unix time of the server's start.
    """

    llm: AsyncLLM
    config: ServerConfig
    names: list[str]
    keys: ApiKeys
    admission: Admission
    heartbeat: Heartbeat
    metrics: Metrics
    admin_keys: ApiKeys = dataclasses.field(default_factory=lambda: ApiKeys([]))
    chat_template: str | None = None
    tracing: Tracing | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def model(self, asked: str | None) -> str:
        """The model's name in the answer. Raises ApiError (404) for another model's."""
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            message = f"model={asked!r}: does not exist; this server has {', '.join(self.names)}"
            raise ApiError(404, message, "model", "model_not_found")
        return asked
