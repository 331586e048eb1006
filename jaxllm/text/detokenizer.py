"""Token ids to text as they come, never a broken character, in constant time a token."""

from collections.abc import Sequence

from jaxllm.text.tokenizer import REPLACEMENT, Tokenizer, utf8_decoder

# How many prompt tokens a stream looks back at: enough for the rest of a character cut at the prompt's end.
CONTEXT_TOKENS = 5
# How long the window method waits for a character to become whole: four bytes make the longest one.
MAX_HELD_TOKENS = 8


class Detokenizer:
    """Text of one stream of tokens.

    The texts returned, concatenated and ended by `flush`, are `tokenizer.decode` of all the ids. Text after a prompt
    goes on where the prompt ended: the space that starts a SentencePiece word is kept, and a character that the prompt
    cut is completed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):
        """Starts a stream.

        Args:
          tokenizer: whose tokens.
          prompt_ids: what the stream continues; no text is made of it.
          skip_special_tokens: leave special tokens out.
          spaces_between_special_tokens: False writes an added token that follows another one directly after it, where
            the decoder would put a space; few do.
        """
        context = prompt_ids[-CONTEXT_TOKENS:]
        hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stream: _ByteStream | _WindowStream
        if tokenizer.bytes_of is not None:
            self._stream = _ByteStream(tokenizer, context, hidden)
        else:
            self._stream = _WindowStream(tokenizer, context, hidden, spaces_between_special_tokens)

    def append(self, ids: Sequence[int]) -> str:
        """The text that these tokens settle; bytes of a character still incomplete are held back."""
        return self._stream.append(ids)

    def flush(self) -> str:
        """The end of the text: an incomplete character, if one is held, as U+FFFD."""
        return self._stream.flush()


class _ByteStream:
    """For decoders that work token by token: bytes go through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], hidden: frozenset[int]):
        assert tokenizer.bytes_of is not None
        self._table, self._hidden = tokenizer.bytes_of, hidden
        self._utf8 = utf8_decoder()
        self._strip = 0 if context else self._table.strip_start
        self.append(context)  # leaves the bytes of an incomplete character, if there are any, in the decoder

    def append(self, ids: Sequence[int]) -> str:
        table, hidden = self._table, self._hidden
        if len(ids) == 1:
            data = b"" if ids[0] in hidden else table[ids[0]]
        else:
            data = b"".join([table[token] for token in ids if token not in hidden])
        return self._start(self._utf8.decode(data)) if self._strip else self._utf8.decode(data)

    def _start(self, text: str) -> str:
        while text and self._strip:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text

    def flush(self) -> str:
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text


class _WindowStream:
    """For any decoder: what a token adds is decode(window + token) less decode(window).

    The window is what the last text came from, so it begins and ends between characters (the prefix and read offsets
    of text-generation-inference and vLLM).
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], hidden: frozenset[int], spaces: bool):
        self._tokenizer, self._hidden = tokenizer, hidden
        self._added = frozenset() if spaces else tokenizer.added_ids
        self._window = [token for token in context if token not in hidden]
        self._settled = len(self._window)
        self._settled_text = self._decode(self._window)
        self._after_added = False

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.backend.decode(ids, skip_special_tokens=False) if ids else ""

    def append(self, ids: Sequence[int]) -> str:
        return "".join([self._one(token) for token in ids if token not in self._hidden])

    def _one(self, token: int) -> str:
        added = token in self._added
        if added and self._after_added:
            text = self.flush() + (self._tokenizer.id_to_token(token) or "")
            self._window.append(token)
            self._settle(self._decode(self._window))
            return text
        self._after_added = added
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._settled
        if held < MAX_HELD_TOKENS and (text.endswith(REPLACEMENT) or len(text) <= len(self._settled_text)):
            return ""
        delta = text[len(self._settled_text) :]
        self._settle(text)
        return delta

    def _settle(self, text: str) -> None:
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._settled_text = self._decode(self._window)

    def flush(self) -> str:
        if len(self._window) == self._settled:
            return ""
        text = self._decode(self._window)
        delta = text[len(self._settled_text) :]
        self._settle(text)
        return delta
