"""A request's text as the front doors give it out: detokenized, cut at stop strings, in deltas."""

import dataclasses
from collections.abc import Sequence

from jaxllm.text.detokenizer import Detokenizer
from jaxllm.text.stop_strings import StopChecker
from jaxllm.text.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)  # not frozen: that triples what making one costs
class TextDelta:
    """What some tokens add.

    Attributes:
      text: new text; may be empty while a character or a possible stop string is incomplete.
      num_tokens: how many of the tokens belong to the output: all, or those up to the end of a stop string.
      stop_string: the stop string that ended the output, or None.
    """

    text: str
    num_tokens: int
    stop_string: str | None = None


class OutputText:
    """The text of one request, or of one of its n samples.

    Attributes:
      num_tokens: output tokens so far.
      finished: whether the text has ended; then nothing may follow.
      stop_string: the stop string that ended it, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int] = (),
        output_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] | None = None,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):
        """Starts a text.

        Args:
          tokenizer: whose tokens; None makes no text (detokenize=False).
          prompt_ids: what the output continues.
          output_ids: output already emitted, of a request that resumes; `text` begins with its text.
          stop: strings that end the output.
          include_stop_str_in_output: keep the stop string, or the stop token's text, in the output.
          min_tokens: stop strings that are complete within so many tokens do not count.
          skip_special_tokens: leave special tokens out of the text.
          spaces_between_special_tokens: see `Detokenizer`.
        """
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer,
                prompt_ids,
                skip_special_tokens=skip_special_tokens,
                spaces_between_special_tokens=spaces_between_special_tokens,
            )
        self._stop = StopChecker(stop, include_stop_str_in_output) if stop and tokenizer is not None else None
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._pieces: list[str] = []
        self.num_tokens = 0
        self.finished = False
        if output_ids:
            self.append(output_ids)

    @property
    def stop_string(self) -> str | None:
        return self._stop.matched if self._stop else None

    @property
    def text(self) -> str:
        """Everything given out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, ids: Sequence[int], *, finished: bool = False, stop_token: bool = False) -> TextDelta:
        """Takes new output tokens.

        Args:
          ids: the tokens.
          finished: these are the last ones: whatever is held back comes out now.
          stop_token: the last of them is a stop token (or end-of-sequence), whose text is left out unless
            include_stop_str_in_output.

        Returns:
          The delta. `stop_string` is set when one ends the output here: the engine must then end the request, and
          tokens after the first `num_tokens` are not part of it.
        """
        if self.finished:
            raise ValueError("the text has ended")
        shown = ids[:-1] if stop_token and not self._include_stop else ids
        text, used = self._advance(shown)
        if self.stop_string is not None:
            self.finished = True
        else:
            used = len(ids)
            if finished and self._detokenizer is not None:
                rest = self._detokenizer.flush()
                if self._stop:
                    rest = self._stop.feed(rest, self.num_tokens + used > self._min_tokens)
                    rest += "" if self._stop.matched is not None else self._stop.flush()
                text += rest
            self.finished = finished
        self.num_tokens += used
        if text:
            self._pieces.append(text)
        return TextDelta(text, used, self.stop_string)

    def _advance(self, ids: Sequence[int]) -> tuple[str, int]:
        """The text of `ids` up to a stop string, and how many of them it takes."""
        if self._detokenizer is None:
            return "", len(ids)
        if self._stop is None:
            return self._detokenizer.append(ids), len(ids)
        pieces = []
        for count, token in enumerate(ids, 1):
            text = self._detokenizer.append([token])
            if text:
                pieces.append(self._stop.feed(text, self.num_tokens + count > self._min_tokens))
                if self._stop.matched is not None:
                    return "".join(pieces), count
        return "".join(pieces), len(ids)
