"""`jaxllm generate`: completes prompts."""

import sys
import time
from typing import Annotated

import typer

from jaxllm.cli.options import engine_options, sampling_options
from jaxllm.errors import InvalidRequestError

Model = Annotated[str, typer.Option(help="'smollm2', a Hugging Face directory or id, or a .gguf file")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no figures and no progress bars on stderr")]


@sampling_options()
@engine_options(without=("model", "seed"))  # --seed is the request's
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="texts to complete (default: all of stdin)")
    ] = None,
    *,
    model: Model = "smollm2",
    quiet: Quiet = False,
    sampling: dict,
    engine: dict,
) -> None:
    """Complete prompts. One is streamed to stdout as it comes; several run at once and are printed in order."""
    from jaxllm.cli.start import longest_request, open_llm, prompt_length, sampling_params, shows_progress
    from jaxllm.cli.stream import since_process_start, stream_answer

    if not prompts:
        if sys.stdin.isatty():
            raise InvalidRequestError("prompt", None, "give one as an argument or on stdin")
        prompts = [sys.stdin.read()]
    # No more than three executables: a prefill, a decode step and a sampler.
    defaults = {"warm_up": False, "max_num_seqs": min(len(prompts), 32)}
    sampling = {"max_tokens": 128, **sampling}
    length, longest = prompt_length(prompts[0]), longest_request(prompts, sampling["max_tokens"])
    progress = shows_progress(quiet)
    options = {**defaults, **engine}
    with open_llm(model, options, sampling, prompt_length=length, longest=longest, progress=progress) as llm:
        params = sampling_params(llm, sampling)
        ready = since_process_start()
        if len(prompts) == 1:
            answer = stream_answer(llm.stream(prompts[0], params))
            print()
            speed = answer.speed()
            if ready is not None:
                speed += f" ({ready + answer.first_token:.2f} s after the start of the process)"
            if answer.interrupted:
                raise SystemExit(130)
        else:
            begin = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=progress)
            seconds = time.perf_counter() - begin
            for number, output in enumerate(outputs):
                print(f"{'' if number == 0 else chr(10)}--- {prompts[number]}\n{output.outputs[0].text}")
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            speed = f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
    if not quiet:
        print(speed, file=sys.stderr)
