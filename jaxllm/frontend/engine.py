"""What both front doors stand on: an opened model, a request builder and a client of its engine core."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxllm.checkpoint import Checkpoint, open_checkpoint
from jaxllm.config import EngineConfig
from jaxllm.core.expected import Expected
from jaxllm.engine.client import Client, CoreProcess, InProcessClient
from jaxllm.engine.restart import RestartingClient, RestartPolicy
from jaxllm.errors import CheckpointError, InvalidRequestError, UnsupportedModelError
from jaxllm.frontend.inputs import ModelLimits, RequestBuilder
from jaxllm.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # "role" and "content", as in OpenAI's API


@dataclasses.dataclass
class FrontEngine:
    """An engine as its front sees it."""

    config: EngineConfig
    client: Client
    builder: RequestBuilder

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InvalidRequestError for a model without one."""
        if self.builder.tokenizer is None:
            raise InvalidRequestError("prompt", None, "this model has no tokenizer: use token ids")
        return self.builder.tokenizer

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> list[int]:
        """The token ids of a conversation under the model's chat template, or another. Raises InvalidRequestError."""
        if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
            raise InvalidRequestError("messages", messages, "must be a list of at least one message")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise InvalidRequestError("messages", message, "a message is a dict with 'role' and 'content'")
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template_kwargs=chat_template_kwargs,
            chat_template=chat_template,
        )
        return self.tokenizer.encode(text, add_special_tokens=False)


def start_engine(config: EngineConfig, *, expected: Expected | None = None, progress: bool = False) -> FrontEngine:
    """Opens the model and starts its core, in this process or in its own. Raises any of jaxllm.errors."""
    checkpoint = open_checkpoint(config.model, config.revision, weights=config.load_format != "dummy")
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        tokenizer = pool.submit(_tokenizer, checkpoint, config)
        client: Client
        if config.engine_process:
            # The processes of a group are started together or not at all.
            most = config.max_engine_restarts if config.coordinator_address is None else 0
            policy = RestartPolicy(most, silence=config.engine_timeout)
            client = RestartingClient(lambda: CoreProcess(config), policy)
        else:
            from jaxllm.engine.build import build_core  # here: the front of a core elsewhere needs no JAX

            client = InProcessClient(build_core(config, checkpoint, expected=expected, progress=progress))
        try:
            limits = ModelLimits(client.ready.vocab_size, client.ready.max_model_len, config.scheduling_policy)
            builder = RequestBuilder(
                tokenizer.result(), limits, checkpoint.config, checkpoint.generation_config, config.seed
            )
        except BaseException:
            client.close()
            raise
    return FrontEngine(config, client, builder)


def _tokenizer(checkpoint: Checkpoint, config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer. Random weights need none: without one, prompts are token ids."""
    try:
        return checkpoint.tokenizer()
    except (CheckpointError, UnsupportedModelError):
        if config.load_format == "dummy":
            return None
        raise
