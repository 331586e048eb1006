#!/usr/bin/env python
"""Completes every row of a JSONL file, and goes on where it was interrupted.

    python scripts/offline_generate.py INPUT.jsonl OUTPUT.jsonl --model smollm2 --max-tokens 64

Input rows are objects with one of `prompt` (text), `messages` (a conversation, under the model's chat template) or
`prompt_token_ids`, and any of: `id` (copied to the output) and the fields of SamplingParams but n, logprobs,
prompt_logprobs and detokenize, over the command line's. Blank lines are skipped.

Output rows come in the order in which they are done. `row` is the input's line number, from 0:

    {"row": 3, "id": null, "text": "…", "token_ids": […], "finish_reason": "length", "stop_reason": null,
     "num_prompt_tokens": 9}
    {"row": 4, "id": null, "error": {"field": "max_tokens", "message": "max_tokens=0: must be …"}}

A bad row becomes an error row and stops nothing. Run the same command again after any interruption, `kill -9` included,
and it completes the rows that are missing. Each row is written once: a line goes out with its newline, what stands
after the last newline is cut off at the next start and its row is done again, and a lock on the output keeps a second
run away. A row without a seed gets one from --seed and its number, so that it comes out the same whenever it is done.

Durability: written lines survive the death of the process. Against the death of the machine the file is synced every
--sync-seconds and at the end: at most so many seconds of rows are then done again.

Memory: --window rows and one bit for each row.
"""

import asyncio
import contextlib
import dataclasses
import difflib
import fcntl
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxllm.cli.options import engine_options, sampling_options
from jaxllm.core.sampling_params import SamplingParams
from jaxllm.errors import ConfigError, EngineDeadError, InvalidRequestError, JaxllmError

PROMPTS = ("prompt", "messages", "prompt_token_ids")
UNSUPPORTED = {"n", "logprobs", "prompt_logprobs", "detokenize"}
PARAMS = {field.name for field in dataclasses.fields(SamplingParams)} - UNSUPPORTED
START = b'{"row": '  # every output line begins so


class DoneRows:
    """A set of row numbers, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, row: int) -> None:
        if row not in self:
            self._bits.extend(bytes(max(0, row // 8 + 1 - len(self._bits))))
            self._bits[row // 8] |= 1 << row % 8
            self.count += 1

    def __contains__(self, row: int) -> bool:
        return row // 8 < len(self._bits) and bool(self._bits[row // 8] >> row % 8 & 1)


class Output:
    """The output file, locked for this process: `done` is what it holds.

    Raises ConfigError if another process has it, or it holds lines that are no output of this program.
    """

    def __init__(self, path: Path, sync_seconds: float):
        self._path, self._sync_seconds, self._synced = path, sync_seconds, time.monotonic()
        self.done = DoneRows()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._recover()
        except BaseException:
            os.close(self._fd)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # a new file's name
        os.close(directory)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output={str(self._path)!r}: another process is writing it") from None

    def _recover(self) -> None:
        """Reads which rows are done and cuts off a torn last line."""
        whole = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    if not (line.startswith(START) or START.startswith(line)):
                        raise self._foreign(number)
                    os.ftruncate(self._fd, whole)
                    break
                try:
                    row = json.loads(line)["row"]
                    if not isinstance(row, int) or row < 0:
                        raise ValueError
                except (ValueError, TypeError, KeyError):
                    raise self._foreign(number) from None
                self.done.add(row)
                whole += len(line)

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(f"output={str(self._path)!r}: line {number} is none of this program's: move the file away")

    def write(self, row: int, fields: dict[str, Any]) -> None:
        """Appends one row, whole."""
        entry = {"row": row, **fields}
        try:
            line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # half a surrogate pair
            line = json.dumps(entry).encode() + b"\n"
        view = memoryview(line)
        while view:
            view = view[os.write(self._fd, view) :]
        self.done.add(row)
        if time.monotonic() - self._synced >= self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """To the disk."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs and unlocks."""
        self.sync()
        os.close(self._fd)


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_row(line: bytes) -> dict[str, Any]:
    """An input row. Raises InvalidRequestError naming what is wrong with it."""
    try:
        fields = json.loads(line, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("row", line[:60].decode(errors="replace"), f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequestError("row", fields, "must be an object")
    return fields


def check_fields(fields: dict[str, Any]) -> None:
    """Raises InvalidRequestError for a row without a prompt, with several, or with a field that does not exist."""
    found = [name for name in PROMPTS if name in fields]
    if len(found) != 1:
        raise InvalidRequestError("row", found, f"needs exactly one of {', '.join(PROMPTS)}")
    known = {"id", *PROMPTS, *PARAMS}
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InvalidRequestError(
                name, fields[name], "no such field" + (f"; did you mean {close[0]!r}?" if close else "")
            )


def params_of(fields: dict[str, Any], defaults: SamplingParams, row: int, seed: int) -> SamplingParams:
    """The row's parameters over the defaults, with a seed that depends on the row alone if it brings none."""
    own = {name: value for name, value in fields.items() if name in PARAMS}
    if isinstance(own.get("logit_bias"), dict):  # JSON's keys are text
        own["logit_bias"] = {int(token): bias for token, bias in own["logit_bias"].items()}
    if defaults.seed is None and own.get("seed") is None:
        own["seed"] = random.Random(f"{seed} {row}").getrandbits(63)
    return dataclasses.replace(defaults, **own)


def error_fields(error: Exception) -> dict[str, Any]:
    """What an error row says."""
    if isinstance(error, InvalidRequestError):
        return {"field": error.field, "message": str(error)}
    return {"field": None, "message": f"{type(error).__name__}: {error}"}


def rows(path: Path, done: DoneRows) -> Iterator[tuple[int, bytes]]:
    """The input's rows that are not done."""
    with open(path, "rb") as file:
        for row, line in enumerate(file):
            if line.strip() and row not in done:
                yield row, line


class Run:
    """Keeps `window` rows in the engine until none is left."""

    def __init__(self, llm: Any, output: Output, defaults: SamplingParams, seed: int, progress: Any):
        self._llm, self._output, self._defaults, self._seed = llm, output, defaults, seed
        self._progress = progress
        self.num_rows = self.num_errors = self.num_tokens = 0

    async def all(self, todo: Iterator[tuple[int, bytes]], window: int) -> None:
        """Raises EngineDeadError or OSError, which no row is to blame for; their rows stay undone."""
        room = asyncio.Semaphore(window)
        try:
            async with asyncio.TaskGroup() as group:
                for row, line in todo:
                    await room.acquire()
                    group.create_task(self._one(row, line)).add_done_callback(lambda _: room.release())
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def _one(self, row: int, line: bytes) -> None:
        identifier = None
        try:
            fields = parse_row(line)
            identifier = fields.get("id")
            check_fields(fields)
            entry = await self._complete(row, fields)
        except (EngineDeadError, OSError):
            raise
        except (JaxllmError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            entry = {"error": error_fields(error)}
        self._output.write(row, {"id": identifier, **entry})
        self.num_rows += 1
        self.num_errors += "error" in entry
        self._progress(self)

    async def _complete(self, row: int, fields: dict[str, Any]) -> dict[str, Any]:
        params = params_of(fields, self._defaults, row, self._seed)
        if "messages" in fields:
            if not isinstance(fields["messages"], list) or not all(isinstance(m, dict) for m in fields["messages"]):
                raise InvalidRequestError("messages", fields["messages"], "must be a list of objects")
            prompt = self._llm.chat_prompt(fields["messages"])
        elif "prompt" in fields:
            prompt = fields["prompt"]
            if not isinstance(prompt, str):
                raise InvalidRequestError("prompt", prompt, "must be text; token ids go into prompt_token_ids")
        else:
            prompt = fields["prompt_token_ids"]
            if not isinstance(prompt, list):
                raise InvalidRequestError("prompt_token_ids", prompt, "must be a list of integers")
        output = await self._llm.complete(prompt, params)
        sample = output.outputs[0]
        self.num_tokens += len(sample.token_ids)
        if sample.finish_reason == "error":
            raise ValueError("the model's logits were not finite")
        return {
            "text": sample.text,
            "token_ids": sample.token_ids,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "num_prompt_tokens": len(output.prompt_token_ids),
        }


@contextlib.contextmanager
def shown(show: bool) -> Iterator[Any]:
    """A callback that shows a run's progress on stderr."""
    if not show:
        yield lambda run: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    begin = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting")

        def update(run: Run) -> None:
            rate = run.num_tokens / max(time.monotonic() - begin, 1e-9)
            words = f"{run.num_rows} rows, {run.num_errors} errors, {rate:.0f} tok/s"
            progress.update(task, description=words)

        yield update


async def generate(todo: Iterator[tuple[int, bytes]], output: Output, model: str, window: int, seed: int,
                   sampling: dict[str, Any], engine: dict[str, Any]) -> Run:  # fmt: skip
    """Runs the rows. Raises any of jaxllm.errors."""
    from jaxllm import AsyncLLM

    async with AsyncLLM(model, max_concurrent_requests=window, **engine) as llm:
        defaults = dataclasses.replace(llm.builder.default_params(), **sampling)
        with shown(sys.stderr.isatty()) as progress:
            run = Run(llm, output, defaults, seed, progress)
            await run.all(todo, window)
    return run


@sampling_options()
@engine_options(without=("model", "seed", "max_waiting_requests", "max_waiting_tokens"))
def main(
    input: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL, a row a request")],
    output: Annotated[Path, typer.Argument(dir_okay=False, help="JSONL; run again to complete it")],
    *,
    model: Annotated[str, typer.Option(help="'smollm2', a Hugging Face directory or id, or a .gguf file")] = "smollm2",
    window: Annotated[int, typer.Option(min=1, help="rows at once; above max_num_seqs it keeps the engine full")] = 512,
    sync_seconds: Annotated[float, typer.Option(min=0, help="sync the output to the disk so often")] = 1.0,
    sampling: dict,
    engine: dict,
) -> None:
    """Complete every row of a JSONL file; run again after an interruption to complete the rest."""
    seed = sampling.pop("seed", None) or 0
    SamplingParams(**sampling)
    file = Output(output, sync_seconds)
    before, todo = file.done.count, rows(input, file.done)
    first = next(todo, None)
    if first is None:
        print(f"nothing to do: {before} rows are done", file=sys.stderr)
        return

    def remaining() -> Iterator[tuple[int, bytes]]:
        yield first
        yield from todo

    try:
        run = asyncio.run(generate(remaining(), file, model, window, seed, {"max_tokens": 128, **sampling}, engine))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to complete the rest", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        file.close()
    print(
        f"{run.num_rows} rows, {run.num_errors} of them errors, {run.num_tokens} tokens; {before} were done before",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except (JaxllmError, OSError) as error:
        print(f"offline_generate: {error}", file=sys.stderr)
        sys.exit(2)
