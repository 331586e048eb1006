"""Token by token from the core to a request's output: text, stop strings, logprobs."""

import numpy as np

from jaxllm.engine.messages import Logprobs, SequenceOutput
from jaxllm.errors import InvalidRequestError, JaxllmError, QueueFullError, Shown
from jaxllm.frontend.inputs import PreparedRequest
from jaxllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.text.output import OutputText
from jaxllm.text.tokenizer import Tokenizer


class RequestCollector:
    """One request's output as it grows.

    Attributes:
      output: all samples so far.
      error: why the core refused the request, if it did; then no more comes.
      embedding: float32[embed] of a pooling request, once it is there.
      to_stop: sequence ids that a stop string has ended and the core does not know of yet; the caller clears it.
    """

    def __init__(self, prepared: PreparedRequest, tokenizer: Tokenizer | None):
        params = prepared.params
        self._tokenizer = tokenizer
        self._needs_text = bool(params.stop)  # at every token: a stop string may end the request
        self._makes_text = tokenizer is not None and params.detokenize
        self._eos = frozenset() if params.ignore_eos else prepared.eos_token_ids
        first = prepared.sequences[0]
        detokenize = tokenizer if self._makes_text else None
        self._texts = [
            OutputText(
                detokenize,
                prepared.prompt_token_ids,
                first.output_token_ids,
                stop=params.stop,
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            for _ in prepared.sequences
        ]
        self._index = {sequence.id: index for index, sequence in enumerate(prepared.sequences)}
        outputs = [
            CompletionOutput(index, text.text, list(first.output_token_ids)) for index, text in enumerate(self._texts)
        ]
        self.output = RequestOutput(
            prepared.request_id, prepared.prompt, prepared.prompt_token_ids, None, outputs, finished=False
        )
        self.to_stop: list[str] = []
        self.error: JaxllmError | None = None
        self.embedding: np.ndarray | None = None

    @property
    def sequence_ids(self) -> list[str]:
        """The core's names of the samples."""
        return list(self._index)

    def open_lists(self) -> dict[str, list[int]]:
        """By sequence id, lists to which a caller who reads no deltas may append lone tokens, in place of `add_tokens`:
        their text is made later, all at once. None where a stop string may end the request."""
        if self._needs_text:
            return {}
        return {sequence_id: self.output.outputs[index].token_ids for sequence_id, index in self._index.items()}

    def _catch_up(self, index: int) -> None:
        """Makes text of tokens that came without `add` or `add_tokens`."""
        text, tokens = self._texts[index], self.output.outputs[index].token_ids
        if len(tokens) > text.num_tokens:
            text.append(tokens[text.num_tokens :])

    def add(self, message: SequenceOutput) -> CompletionOutput | None:
        """Takes one sample's news in; what is new of it as a delta, or None if it had ended already."""
        index = self._index[message.id]
        sample = self.output.outputs[index]
        if sample.finish_reason is not None:
            return None
        if message.refused is not None:
            field, value, limit = message.refused
            self.error = InvalidRequestError(field, Shown(value), limit)
        elif message.queue_full:
            self.error = QueueFullError(message.error)
        if message.embedding is not None:
            self.embedding = np.frombuffer(message.embedding, np.float32)
        self._catch_up(index)
        delta = CompletionOutput(index)
        by_stop_token = message.stop_token is not None
        change = self._texts[index].append(
            message.token_ids, finished=message.finish_reason is not None, stop_token=by_stop_token
        )
        delta.text, delta.token_ids = change.text, message.token_ids[: change.num_tokens]
        delta.finish_reason, delta.error = message.finish_reason, message.error
        if change.stop_string is not None:
            delta.finish_reason, delta.stop_reason, delta.error = "stop", change.stop_string, None
            self.to_stop.append(message.id)
        elif by_stop_token and message.stop_token not in self._eos:
            delta.stop_reason = message.stop_token
        if message.logprobs is not None:
            delta.logprobs = [self._logprobs(entry) for entry in message.logprobs[: change.num_tokens]]
            delta.cumulative_logprob = sum(entry.logprob for entry in message.logprobs[: change.num_tokens])
        if message.prompt_logprobs is not None:
            delta.prompt_logprobs = [None, *map(self._logprobs, message.prompt_logprobs)]
            self.output.prompt_logprobs = delta.prompt_logprobs
        if self.output.queue_time is None and message.token_ids:
            self.output.queue_time = message.queue_time
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, message.num_cached_tokens)
        self._extend(sample, delta)
        return delta

    def add_tokens(self, sequence_id: str, tokens: list[int]) -> CompletionOutput | None:
        """`add` for tokens that come with nothing else. The list is the delta's from now on."""
        index = self._index[sequence_id]
        sample = self.output.outputs[index]
        if sample.finish_reason is not None:
            return None
        sample.token_ids += tokens
        if not self._makes_text:
            return CompletionOutput(index, "", tokens)
        change = self._texts[index].append(tokens)
        delta = CompletionOutput(index, change.text, tokens)
        if change.stop_string is not None:
            delta.token_ids = tokens[: change.num_tokens]
            del sample.token_ids[len(sample.token_ids) - len(tokens) + change.num_tokens :]
            delta.finish_reason, delta.stop_reason = "stop", change.stop_string
            self.to_stop.append(sequence_id)
            self._end(sample, delta)
        return delta

    def _end(self, sample: CompletionOutput, delta: CompletionOutput) -> None:
        sample.finish_reason, sample.stop_reason = delta.finish_reason, delta.stop_reason
        sample.error = delta.error
        sample.text = self._texts[sample.index].text
        self.output.finished = all(other.finished for other in self.output.outputs)

    def _extend(self, sample: CompletionOutput, delta: CompletionOutput) -> None:
        sample.token_ids += delta.token_ids
        if delta.logprobs is not None:
            sample.logprobs = [] if sample.logprobs is None else sample.logprobs
            sample.logprobs += delta.logprobs
            sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + (delta.cumulative_logprob or 0.0)
        if delta.finish_reason is not None:
            self._end(sample, delta)

    def snapshot(self) -> RequestOutput:
        """The output so far, texts included."""
        for index, (sample, text) in enumerate(zip(self.output.outputs, self._texts, strict=True)):
            self._catch_up(index)
            sample.text = text.text
        return self.output

    def _logprobs(self, entry: Logprobs) -> dict[int, Logprob]:
        chosen = {entry.token: Logprob(entry.logprob, entry.rank, self._text(entry.token))}
        for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1):
            if token not in chosen:
                chosen[token] = Logprob(logprob, rank, self._text(token))
        return chosen

    def _text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token)
