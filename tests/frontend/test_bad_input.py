"""Bad input: a typed error that names the field, the value and the limit, before work starts; others go on."""

import dataclasses
import json
import math
import os
import re

import jax
import numpy as np
import pytest

from jaxllm import LLM, EngineConfig, SamplingParams
from jaxllm.config import FIXED, config_from
from jaxllm.engine import resolve
from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    UnsupportedModelError,
)
from tests.engine import tiny

GOOD = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture
def beside(engine):
    """A stream that is open while something is refused, and afterwards has the tokens that it should have."""
    llm: LLM = engine()
    prompt = tiny.prompts(1, seed=5)[0]
    expected = llm.generate(prompt, GOOD)[0].outputs[0].token_ids
    stream = llm.stream(prompt, GOOD)
    tokens = list(next(stream).token_ids)
    steps = llm.stats()["steps"]
    yield llm
    assert llm.stats()["steps"] - steps <= 4, "a refusal costs no work"
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == expected
    assert llm.stats()["running"] == llm.stats()["waiting"] == 0


@pytest.mark.parametrize(
    ("prompt", "field", "limit"),
    [
        ("", "prompt", "at least one token"),
        ([[]], "prompt", "at least one token"),
        ({"prompt_token_ids": []}, "prompt", "at least one token"),
        ({"text": "x"}, "prompt", "needs 'prompt' or 'prompt_token_ids'"),
        ([5] * 128, "prompt", "has 128 tokens; at most 127"),
        ("a" * 500, "prompt", "has 500 tokens; at most 127"),
        ([5, 300], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([5, -1], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([5, 2**70], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([5, 1.0], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([5, True], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([5, None], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([5, "a"], "prompt_token_ids", r"integers in \[0, 300\)"),
        ([[5, [6]]], "prompt_token_ids", r"integers in \[0, 300\)"),
        (np.asarray([5.0, 6.0]), "prompt_token_ids", r"integers in \[0, 300\)"),
        (b"bytes", "prompt_token_ids", "text or a sequence of token ids"),
        ([None], "prompt_token_ids", "text or a sequence of token ids"),
        (5, "prompts", "one prompt or a sequence"),
        (None, "prompts", "one prompt or a sequence"),
        ("lone \ud800 surrogate", "prompt", "valid Unicode; character 5"),
    ],
)
def test_prompts(beside, prompt, field, limit):
    with pytest.raises(InvalidRequestError, match=limit) as caught:
        beside.generate(prompt, GOOD)
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("seed", 2**64),
        ("seed", 1.0),
        ("n", 0),
        ("n", 10**6),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", -2),
        ("prompt_logprobs", "all"),
        ("logit_bias", {5: math.nan}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {300: 1.0}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [300]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["x"]),
        ("stop", [""]),
        ("stop", ["x"] * 65),
        ("stop", ["\udc80"]),
        ("bad_words", [""]),
        ("bad_words", ["x" * 200]),
        ("bad_words", [f"w{i:03}" for i in range(129)]),
        ("bad_words", ["\ud800"]),
        ("bad_words", "word"),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("allowed_token_ids", "abc"),
        ("logit_bias", [5, 6]),
        ("temperature", 10**400),
        ("top_k", 2**64),
        ("max_tokens", 10**30),
    ],
)
def test_parameters(beside, field, value):
    with pytest.raises(InvalidRequestError) as caught:
        beside.generate([5, 6], SamplingParams(**{field: value}))
    assert caught.value.field == field and str(caught.value).startswith(f"{field}=")


def test_parameters_changed_after_they_were_made(beside):
    params = SamplingParams(temperature=0, max_tokens=4)
    params.temperature = math.nan
    with pytest.raises(InvalidRequestError, match="temperature=nan"):
        beside.generate([5, 6], params)
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        beside.generate([5, 6], {"temperature": 0})


def test_one_bad_prompt_of_many_starts_none(beside):
    before = beside.stats()["scheduled_tokens"]
    with pytest.raises(InvalidRequestError, match="prompt_token_ids=300"):
        beside.generate([[5] * 60, [6] * 60, [300]], GOOD)
    assert beside.stats()["scheduled_tokens"] - before < 60
    with pytest.raises(InvalidRequestError, match="sampling_params"):
        beside.generate([[5], [6]], [GOOD])
    with pytest.raises(InvalidRequestError, match="priority"):
        beside.generate([[5], [6]], GOOD, priority=[1])
    with pytest.raises(InvalidRequestError, match="priority=1: must be 0 under scheduling_policy='fcfs'"):
        beside.generate([[5], [6]], GOOD, priority=[0, 1])
    with pytest.raises(InvalidRequestError, match="priority='high'"):
        beside.generate([[5]], GOOD, priority=["high"])
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        beside.generate([[5]], GOOD, cache_salt=7)


def test_the_least_tokens_must_have_room(beside):
    for most in (1000, None):
        with pytest.raises(InvalidRequestError, match=r"min_tokens=127: at most 126: .* 2 tokens.* max_model_len=128"):
            beside.generate([5, 6], SamplingParams(min_tokens=127, max_tokens=most))


def test_the_most_tokens_need_no_room(engine):
    (output,) = engine().generate([5, 6], SamplingParams(min_tokens=126, max_tokens=1000))
    assert len(output.outputs[0].token_ids) == 126 and output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("emitted", "params", "field"),
    [
        ([300], {}, "output_token_ids"),
        (7, {}, "output_token_ids"),
        ([7] * 4, {"max_tokens": 4}, "output_token_ids"),
        ([7, 9], {"stop_token_ids": [9]}, "output_token_ids"),
        ([7, tiny.EOS], {}, "output_token_ids"),
        ([tiny.FIRST_BYTE + byte for byte in b"xaby"], {"stop": ["ab"]}, "output_token_ids"),
        ([7], {"n": 2}, "n"),
    ],
)
def test_resumption_of_what_cannot_go_on(beside, emitted, params, field):
    with pytest.raises(InvalidRequestError) as caught:
        beside.stream([5, 6], SamplingParams(**params), output_token_ids=emitted)
    assert caught.value.field == field


def test_too_many_waiting(checkpoint):
    with tiny.llm(checkpoint("llama"), max_waiting_requests=3) as llm:
        with pytest.raises(QueueFullError, match="max_waiting_requests=3"):
            llm.generate([[5, 6]] * 4, SamplingParams(temperature=0, max_tokens=2))
        assert len(llm.generate([[5, 6]] * 3, SamplingParams(temperature=0, max_tokens=2))) == 3
        assert llm.stats()["waiting"] == 0


# --- engines that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_sequences": 4}, "unknown option 'max_num_sequences'; did you mean 'max_num_seqs'?"),
        ({"xyzzy": 4}, r"unknown option 'xyzzy'\. Options: model, "),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5"),
        ({"max_num_seqs": True}, "max_num_seqs=True: must be an integer"),
        ({"max_num_batched_tokens": "128"}, "max_num_batched_tokens='128': must be an integer"),
        ({"kv_cache_memory_bytes": 1e9}, "kv_cache_memory_bytes=1000000000.0: must be an integer"),
        ({"max_waiting_requests": 0}, "max_waiting_requests=0: must be an integer of at least 1"),
        ({"max_waiting_tokens": True}, "max_waiting_tokens=True: must be an integer"),
        ({"page_size": 0}, "page_size=0"),
        ({"page_size": True}, "page_size=True: must be an integer"),
        ({"page_size": 1025}, r"page_size=1025: must be an integer in \[1, 1024\]"),
        ({"memory_utilization": "0.9"}, "memory_utilization='0.9': must be a number"),
        ({"memory_utilization": True}, "memory_utilization=True: must be a number"),
        ({"seed": "0"}, "seed='0': must be an integer"),
        ({"seed": None}, "seed=None: must be an integer"),
        ({"seed": False}, "seed=False: must be an integer"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be in"),
        ({"warm_up": "no"}, "warm_up='no': must be True or False"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1: must be True or False"),
        ({"disable_custom_all_reduce": 0}, "disable_custom_all_reduce=0: must be True or False"),
        ({"engine_process": None}, "engine_process=None: must be True or False"),
        ({"revision": 5}, "revision=5: must be text"),
        ({"compilation_cache_dir": 5}, "compilation_cache_dir=5: must be a path"),
        ({"compilation_cache_dir": "/dev/null/xla"}, "compilation_cache_dir='/dev/null/xla': must be a directory"),
        ({"compilation_cache_dir": "a\0b"}, "compilation_cache_dir=.*: must be a directory"),
        ({"token_rungs": 128}, "token_rungs=128: must be"),
        ({"token_rungs": ("4", "128")}, r"token_rungs=\('4', '128'\): must be"),
        ({"memory_utilization": math.nan}, "memory_utilization=nan"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"load_format": "pt"}, "load_format='pt'"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy='lifo'"),
        ({"attention_backend": "cuda"}, "attention_backend='cuda': must be None, 'reference', 'xla', 'gpu' or 'tpu'"),
        ({"data_parallel_size": 0}, "data_parallel_size=0"),
        ({"data_parallel_size": True}, "data_parallel_size=True"),
        ({"gpu_memory_utilization": 2}, "memory_utilization=2: must be"),
        ({"gpu_memory_utilization": 0.5, "memory_utilization": 0.5}, "gpu_memory_utilization=0.5: is another name of"),
        ({"block_size": 16}, "block_size=16: is another name of page_size, which is 8"),  # tiny.OPTIONS has page_size
        ({"tensor_parallel_size": True}, "tensor_parallel_size=True: must be an integer of at least 1"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3: must divide num_attention_heads=4 .* allows 1, 2, 4"),
        ({"trust_remote_code": True}, "trust_remote_code=True: must be False, no remote code is ever run"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: must be 1, .*tensor_parallel_size"),
        ({"pipeline_parallel_size": True}, "pipeline_parallel_size=True: must be 1"),
        (
            {"distributed_executor_backend": "ray"},
            "distributed_executor_backend='ray': must be None or 'mp' or 'uni', ",
        ),
        ({"enforce_eager": True}, "enforce_eager=True: must be False, steps are always compiled"),
        ({"quantization": "fp8"}, "quantization='fp8': must be None"),
        ({"swap_space": 4}, "swap_space=4: must be 0"),
        ({"max_num_seqs": 32, "max_num_batched_tokens": 16}, "max_num_batched_tokens=16"),
        ({"token_rungs": (32, 4, 128)}, "token_rungs=.*ascending"),
        ({"token_rungs": (4, 32)}, "token_rungs=.*max_num_batched_tokens=128"),
        ({"max_model_len": 1000}, "max_model_len=1000: the model's limit is 128"),
        ({"max_model_len": 1}, "max_model_len=1"),
    ],
)
def test_options(checkpoint, options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        tiny.llm(checkpoint("llama"), **options)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_an_accelerators_kernel_needs_the_accelerator(checkpoint, name):
    if jax.default_backend() == name:
        pytest.skip("this machine has one")
    with pytest.raises(ConfigError, match=f"attention_backend='{name}': needs a {name.upper()}"):
        tiny.llm(checkpoint("llama"), attention_backend=name)


def test_vllms_names_of_options(tmp_path):
    options = {"gpu_memory_utilization": 0.5, "block_size": 16, "tensor_parallel_size": 1, "trust_remote_code": False}
    config = config_from("m", options | {"compilation_cache_dir": tmp_path})
    assert config == EngineConfig(model="m", memory_utilization=0.5, page_size=16, compilation_cache_dir=str(tmp_path))
    for name, (values, reason) in FIXED.items():
        for value in values:
            assert config_from("m", {name: value}) == EngineConfig(model="m")
        with pytest.raises(ConfigError, match=re.escape(reason)):
            config_from("m", {name: "something else"})
    assert not FIXED.keys() & {field.name for field in dataclasses.fields(EngineConfig)}
    with pytest.raises(ConfigError, match="did you mean 'tensor_parallel_size'"):
        config_from("m", {"tensor_parallel": 1})
    for model in ("", None):
        with pytest.raises(ConfigError, match=f"model={model!r}"):
            EngineConfig(model=model)  # type: ignore[arg-type]


def test_no_memory_on_the_machine(checkpoint, monkeypatch):
    assert 0 < resolve.host_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    model = checkpoint("llama")
    with pytest.raises(OutOfMemoryError, match=r"tables of max_num_seqs=1000000000 .*nothing is left"):
        tiny.llm(model, max_num_seqs=10**9, max_num_batched_tokens=10**9, token_rungs=(10**9,))
    monkeypatch.setattr(resolve, "host_memory", lambda: 1_000_000)
    with pytest.raises(OutOfMemoryError, match=r"weights take .* machine has 0\.001 GB left") as caught:
        tiny.llm(model)
    fits = int(str(caught.value).split("kv_cache_memory_bytes=")[1].split()[0])
    with tiny.llm(model, kv_cache_memory_bytes=fits) as llm:
        assert len(llm.generate([5, 6], GOOD)[0].outputs[0].token_ids) == 30


def test_no_memory_for_the_cache(checkpoint):
    with pytest.raises(OutOfMemoryError, match=r"kv_cache_memory_bytes=1: .* 'full', .* page of 8 tokens takes 2048"):
        tiny.llm(checkpoint("llama"), kv_cache_memory_bytes=1)
    with pytest.raises(OutOfMemoryError, match=r"holds 120 tokens in group 'full'; max_model_len=128 needs 128"):
        tiny.llm(checkpoint("llama"), max_model_len=128, kv_cache_memory_bytes=15 * 2048)
    with pytest.raises(OutOfMemoryError, match="group 'window 19'"):
        tiny.llm(checkpoint("mistral"), max_model_len=128, kv_cache_memory_bytes=5000)
    with tiny.llm(checkpoint("llama"), kv_cache_memory_bytes=3 * 2048) as llm:  # no length asked for: what fits
        assert llm.max_model_len == 24
        with pytest.raises(InvalidRequestError, match="at most 23"):
            llm.generate([5] * 24)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="model=''"):
        LLM("")
    for name in (str(tmp_path / "nothing"), "./nothing", "nothing.gguf"):
        with pytest.raises(ModelNotFoundError, match="model="):
            LLM(name)
    with pytest.raises(ModelNotFoundError, match="no-such/model"):  # tests run offline
        LLM("no-such/model")


def test_models_that_are_not_supported(tmp_path):
    def directory(**config) -> str:
        (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIGS["llama"] | config))
        return str(tmp_path)

    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        LLM(directory(architectures=["MambaForCausalLM"]), load_format="dummy")
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        LLM(directory(quantization_config={"quant_method": "gptq"}), load_format="dummy")
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        LLM(directory(hidden_size=None), load_format="dummy")


def test_weights_that_are_wrong(tmp_path):
    directory = tiny.write_checkpoint("llama", tmp_path / "short")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tiny.llm(directory)
    directory = tiny.write_checkpoint("llama", tmp_path / "other", intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"mlp.*48.*64|mlp.*64.*48"):
        tiny.llm(directory)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a gguf file at all" * 9]
)
def test_a_corrupt_gguf(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        LLM(str(path))


def test_random_weights_need_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIGS["llama"]))
    with tiny.llm(tmp_path, load_format="dummy", **tiny.LEAST) as llm:
        assert len(llm.generate([5, 6], GOOD)[0].outputs[0].token_ids) == 30
        assert llm.generate([5, 6], SamplingParams(logprobs=1, max_tokens=1))[0].outputs[0].logprobs
        for asked in ({"stop": ["a"]}, {"bad_words": ["a"]}):
            with pytest.raises(InvalidRequestError, match="no tokenizer"):
                llm.generate([5, 6], SamplingParams(**asked))
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            llm.generate("text")
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "hi"}])
