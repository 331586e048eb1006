"""llama.cpp on the three CPU workloads, continuous batching through its batch API, one JSON line. Run by
cpu_table.py in an environment with llama-cpp-python and numpy."""

import argparse
import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy as np
from common import emit, start_seconds, workloads

BATCH = 512  # tokens of one decode call, llama.cpp's default


class Engine:
    """A context that serves several sequences at once, greedy, end-of-sequence ignored."""

    def __init__(self, path: Path, threads: int, num_slots: int, num_tokens: int):
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = num_tokens, BATCH, BATCH, num_slots
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, "no context"
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def run(self, requests: list[tuple[list[int], int]]) -> float:
        """Seconds until all are done. Each step decodes what runs, then fills up with prompt tokens."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        begin = time.perf_counter()
        prompts = [prompt for prompt, _ in requests]
        computed, left = [0] * len(requests), [count for _, count in requests]
        last: list[int | None] = [None] * len(requests)
        while any(left):
            rows: list[tuple[int, int]] = []  # (place in the batch, sequence) of rows that need logits
            size = 0
            for sequence, token in enumerate(last):
                if token is not None and left[sequence]:
                    size = self._add(size, token, computed[sequence], sequence, True)
                    rows.append((size - 1, sequence))
                    computed[sequence] += 1
            for sequence, prompt in enumerate(prompts):
                while computed[sequence] < len(prompt) and size < BATCH:
                    ends = computed[sequence] == len(prompt) - 1
                    size = self._add(size, prompt[computed[sequence]], computed[sequence], sequence, ends)
                    computed[sequence] += 1
                    if ends:
                        rows.append((size - 1, sequence))
            self.batch.n_tokens = size
            status = llama_cpp.llama_decode(self.context, self.batch)
            assert status == 0, f"llama_decode: {status}"
            for place, sequence in rows:
                logits = llama_cpp.llama_get_logits_ith(self.context, place)
                last[sequence] = int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())
                left[sequence] -= 1
                if not left[sequence]:
                    llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        return time.perf_counter() - begin

    def _add(self, at: int, token: int, position: int, sequence: int, wants_logits: bool) -> int:
        batch = self.batch
        batch.token[at], batch.pos[at] = token, position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.logits[at] = wants_logits
        return at + 1


@llama_cpp.llama_log_callback
def _silent(level, text, data):
    pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    work = workloads()
    prompt, new_tokens = work.CPU_SINGLE
    requests = work.cpu_ragged()
    engine = Engine(options.gguf, options.threads, len(requests), sum(len(p) + n for p, n in requests) + 1024)
    engine.run([(prompt, 1)])
    first_token = start_seconds()
    engine.run([(prompt, 4)])
    emit(
        engine="llama.cpp Q4_1",
        decode=new_tokens / (engine.run([(prompt, new_tokens + 1)]) - engine.run([(prompt, 1)])),
        prefill=len(work.CPU_PREFILL) / engine.run([(work.CPU_PREFILL, 1)]),
        ragged=sum(n for _, n in requests) / engine.run(requests),
        first_token=first_token,
    )


if __name__ == "__main__":
    main()
