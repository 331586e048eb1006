"""The tokenizer that the engine and its front doors see."""

import codecs
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.errors import InvalidRequestError
from jaxllm.text.token_bytes import TokenBytes, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from jaxllm.text.chat_template import ChatTemplate

_UTF8 = codecs.getincrementaldecoder("utf-8")
REPLACEMENT = "�"


class Tokenizer:
    """Text to token ids and back, over the `tokenizers` library. Safe to share between threads.

    Attributes:
      backend: the `tokenizers.Tokenizer`, truncation and padding off.
      special_tokens: "bos_token", "eos_token" and the like -> the token's text; what chat templates see.
      special_ids: ids of special tokens, those that `skip_special_tokens` leaves out.
      bytes_of: each token's bytes; None for the rare decoder that does not work token by token.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        """Wraps a built tokenizer.

        Args:
          backend: what it runs on; taken over.
          special_tokens: texts by role: "bos_token", "eos_token", "pad_token", "unk_token", …
          chat_templates: Jinja sources by name; "default" is the one that a chat uses, "tool_use" with tools if there.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_templates = dict(chat_templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.added_ids = frozenset(added)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.bytes_of: TokenBytes | None = token_bytes(backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are recognized, as in Hugging Face tokenizers.

        Args:
          text: what to encode.
          add_special_tokens: put beginning- or end-of-sequence tokens around it where the model wants them.

        Raises:
          InvalidRequestError: the text is not valid Unicode (a lone surrogate).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel for several."""
        for text in texts:
            if not isinstance(text, str):
                raise InvalidRequestError("prompt", text, "must be a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                limit = f"must be valid Unicode; character {error.start} is a lone surrogate"
                raise InvalidRequestError("prompt", text, limit) from None
        if len(texts) == 1:
            return [self.backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`: exactly what a `Detokenizer` streams for them.

        It is what Hugging Face's decode gives, with two differences: nothing is cleaned up (spaces before punctuation
        stay), and where byte tokens of a SentencePiece vocabulary are not valid UTF-8, only the invalid ones become
        U+FFFD and not the valid characters beside them.
        """
        table = self.bytes_of
        if table is None:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        hidden = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join([table[token] for token in ids if token not in hidden]).decode("utf-8", "replace")
        strip = min(table.strip_start, len(text) - len(text.lstrip(" ")))
        return text[strip:]

    def id_to_token(self, token: int) -> str | None:
        """The token's spelling in the vocabulary; None outside it."""
        return self.backend.id_to_token(token) if 0 <= token < self.vocab_size else None

    def token_to_id(self, text: str) -> int | None:
        """The id of a token by its spelling in the vocabulary; None if there is none."""
        return self.backend.token_to_id(text)

    def token_text(self, token: int) -> str:
        """The token's text alone, special or not; bytes that are no whole character read as U+FFFD."""
        if self.bytes_of is not None:
            return self.bytes_of[token].decode("utf-8", "replace")
        return self.backend.decode([token], skip_special_tokens=False)

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token. A model may have more: see its generation_config."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token."""
        return self._special_id("pad_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` works without a template being given."""
        return bool(self._chat_templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's template makes of a conversation.

        Encode it with `add_special_tokens=False`: templates write special tokens themselves.

        Args:
          messages: dicts with "role" and "content", and what else the template reads.
          tools: JSON schemas of functions that the model may call.
          add_generation_prompt: end with the beginning of the assistant's turn.
          chat_template: Jinja source in place of the model's own; from the operator, never from a request.
          chat_template_kwargs: further variables of the template, e.g. enable_thinking.

        Raises:
          InvalidRequestError: the model has no template, or the template refuses the conversation.
        """
        from jaxllm.text.chat_template import ChatTemplate, choose_template  # here: jinja2 takes time to import

        source = chat_template or choose_template(self._chat_templates, with_tools=bool(tools))
        compiled = self._compiled.get(source)
        if compiled is None:
            compiled = self._compiled[source] = ChatTemplate(source)
        variables = {**self.special_tokens, **(chat_template_kwargs or {})}
        return compiled.render(messages, tools, add_generation_prompt, variables)


def utf8_decoder() -> codecs.IncrementalDecoder:
    """An incremental decoder whose output, concatenated, is `bytes.decode("utf-8", "replace")`."""
    return _UTF8("replace")
