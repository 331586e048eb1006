"""`jaxllm chat`: a conversation."""

import sys
from typing import Annotated, Any

import typer

from jaxllm.cli.generate import Model, Quiet
from jaxllm.cli.options import engine_options, sampling_options
from jaxllm.errors import InvalidRequestError

COMMANDS = "/reset begins anew, /exit ends, Ctrl-C stops an answer"


@sampling_options()
@engine_options(without=("model", "seed"))  # --seed is the request's
def chat(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="the same as --model")] = None,
    *,
    model: Model = "smollm2",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="ask this, print the answer and end")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="the system prompt")] = None,
    quiet: Quiet = False,
    sampling: dict,
    engine: dict,
) -> None:
    """Talk with a model. From a pipe, each line of stdin is a message."""
    from jaxllm.cli.start import open_llm, prompt_length, sampling_params, shows_progress

    terminal = prompt is None and sys.stdin.isatty()
    # One question needs three executables; a conversation compiles the other step sizes in the background.
    defaults = {"max_num_seqs": 1, "warm_up": terminal}
    length = prompt_length((system or "") + (prompt or "")) + 32  # the template's own tokens
    options, progress = {**defaults, **engine}, shows_progress(quiet)
    with open_llm(name or model, options, sampling, prompt_length=length, progress=progress) as llm:
        # None: as long as the context has room
        conversation = Conversation(llm, sampling_params(llm, {"max_tokens": None, **sampling}), system, quiet)
        if prompt is not None:
            conversation.say(prompt, strict=True)
            return
        if terminal:
            import readline  # noqa: F401  # gives input() its line editing and history

            print(f"{name or model}: {COMMANDS}", file=sys.stderr)
        while conversation.turn(terminal):
            pass


class Conversation:
    """The messages so far; a conversation that the model refuses stays as it was before."""

    def __init__(self, llm: Any, params: Any, system: str | None, quiet: bool):
        self._llm, self._params, self._quiet = llm, params, quiet
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._system)

    def turn(self, terminal: bool) -> bool:
        """Reads one line and does what it says; False when the conversation is over."""
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            print()
            return False
        except KeyboardInterrupt:
            print()
            return True
        if not terminal and not line:
            return False
        text = line.strip()
        if text == "/exit":
            return False
        if text == "/reset":
            self.messages = list(self._system)
        elif text.startswith("/") and " " not in text:
            print(f"{text}: no such command; {COMMANDS}", file=sys.stderr)
        elif text:
            self.say(text)
        return True

    def say(self, text: str, *, strict: bool = False) -> None:
        """Sends a message and streams the answer. A refusal is printed, or raised if `strict`."""
        from jaxllm.cli.stream import stream_answer

        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = stream_answer(self._llm.stream(messages, self._params))
        except InvalidRequestError as error:
            if strict:
                raise
            print(f"jaxllm: {error}; /reset begins anew", file=sys.stderr)
            return
        print(flush=True)
        if not self._quiet:
            print(f"[{answer.speed()}]", file=sys.stderr)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        if answer.interrupted and strict:
            raise SystemExit(130)
