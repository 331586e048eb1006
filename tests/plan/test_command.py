"""`jaxllm plan` as users call it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jaxllm.cli.app import app
from jaxllm.errors import ConfigError, InvalidRequestError, ModelNotFoundError, OutOfMemoryError
from jaxllm.plan.chips import HERE
from tests.plan.shapes import SMALL

# The last line of stderr says how many backends JAX has started.
COMMAND = """
import sys
from jaxllm.cli import main
sys.argv = ["jaxllm", "plan", *sys.argv[1:]]
try:
    main()
finally:
    from jax._src import xla_bridge
    print(len(xla_bridge._backends), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps(SMALL))
    return str(made)


def run(*words: str):
    return CliRunner().invoke(app, ["plan", *words])


def test_it_touches_no_device(directory):
    words = [directory, "--chip", "v6e", "--chips", "4", "--json", "-"]
    command = [sys.executable, "-c", COMMAND, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.strip().splitlines()[-1] == "0", done.stderr
    made = json.loads(done.stdout)
    assert made["fits"] and made["chip"]["name"] == "v6e" and made["devices"] == 4
    assert {(mesh["data"], mesh["tensor"]) for mesh in made["meshes"]} == {(4, 1), (2, 2), (1, 4)}
    assert made["best_throughput"].keys() == {"data", "tensor"}


def test_tables_json_and_drawing(directory, tmp_path):
    file, drawing, again = (tmp_path / name for name in ("plan.json", "plan.svg", "again.svg"))
    words = [directory, "--chip", "h100", "--max-model-len", "1024", "--gpu-memory-utilization", "0.5"]
    words += ["--block-size", "16", "--input-len", "300", "--output-len", "100", "--max-num-seqs", "20"]
    done = run(*words, "--workload", "single_stream", "--json", str(file), "--plot", str(drawing))
    assert done.exit_code == 0, done.output
    for text in ("on 1 × h100: fits", "KV cache", "single_stream", "█", "░", "TPOT floor"):
        assert text in done.output
    made = json.loads(file.read_text())
    assert (made["context"], made["output_len"]) == (300, 100)
    (mesh,) = made["meshes"]
    assert mesh["max_model_len"] == 1024 and mesh["max_requests"] == 20 and mesh["groups"][0]["page_size"] == 16
    planned = sum(mesh[name] for name in ("weight_bytes", "step_bytes", "table_bytes", "cache_bytes"))
    assert planned == int(0.5 * mesh["device_limit"])
    assert [batch["requests"] for batch in mesh["batches"]] == [1, 4, 16, 20]
    assert made["workloads"][0]["steps"] == 512
    text = drawing.read_text()
    assert "<svg" in text and "predicted" in text and len(text) < 100_000
    run(*words, "--plot", str(again))
    assert again.read_text() == text


def test_a_fixed_mesh(directory):
    done = run(directory, "--chip", "v5p", "--chips", "8", "-tp", "2", "-dp", "4", "--json", "-")
    made = json.loads(done.output)
    assert [(mesh["data"], mesh["tensor"]) for mesh in made["meshes"]] == [(4, 2)]
    assert made["calibration"] is None and made["meshes"][0]["batches"][0]["tpot"]["predicted"] is None


def test_models_by_shape_and_by_gguf():
    """The default model is a GGUF file of nine heads; a shape gets the length that its peers were measured with."""
    done = run("smollm2", "--chip", "l4", "--chips", "3", "--json", "-")
    assert {mesh["tensor"] for mesh in json.loads(done.output)["meshes"]} == {1, 3}
    done = run("shape:llama-3.1-8b", "--chip", "h200", "--json", "-")
    assert json.loads(done.output)["meshes"][0]["max_model_len"] == 18432
    done = run("shape:llama-3.1-8b", "--chip", "h200", "--context", "32768", "--json", "-")
    assert json.loads(done.output)["meshes"][0]["max_model_len"] == 32768 + 128  # unless a request is longer


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["shape:llama-3.3-70b", "--chip", "v6e"], OutOfMemoryError, "8 chips would do"),
        (["shape:none", "--chip", "v6e"], ModelNotFoundError, "the shapes are"),
        (["shape:llama-3.1-8b", "--chip", "v7"], ConfigError, "chip='v7': must be one of"),
        (["shape:llama-3.1-8b", "--chip", "h100", "--workload", "none"], InvalidRequestError, "must be one of"),
        (["shape:llama-3.1-8b", "--chip", "h100", "--memory-utilization", "2"], ConfigError, "memory_utilization=2"),
        (["shape:llama-3.1-8b", "--chip", "h100", "--context", "200000"], ConfigError, "the model's limit is 131072"),
        (["none", "--chip", "h100", "--json", "/no/such/file"], ConfigError, "--json /no/such/file: must be a file in"),
        (["none", "--chip", "h100", "--plot", "/no/such.svg"], ConfigError, "--plot /no/such.svg: must be a file in"),
        (["none", "--chip", "h100", "--plot", "plan.foo"], ConfigError, "--plot plan.foo: must end in one of ."),
    ],
)
def test_what_is_refused(words, error, told):
    done = run(*words)
    assert isinstance(done.exception, error) and told in str(done.exception)


def test_a_refusal_as_json():
    done = run("shape:llama-3.3-70b", "--chip", "v6e", "--json", "-")
    made = json.loads(done.output)
    assert isinstance(done.exception, OutOfMemoryError) and made["reason"] == str(done.exception)
    assert (made["fits"], made["chips_needed"]) == (False, 8)


def test_a_calibration_of_another_chip_is_refused(directory):
    done = run(directory, "--chip", "h200", "--calibration", str(HERE / "calibrations" / "h100.json"))
    assert isinstance(done.exception, ConfigError) and "was taken on h100, not on h200" in str(done.exception)
