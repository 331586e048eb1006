"""`jaxllm convert` and what restores it: the same model on any mesh, and damage that is named."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoint import open_checkpoint, orbax_source
from jaxllm.checkpoint.orbax_source import MANIFEST, WEIGHTS, StoredArray, write_manifest
from jaxllm.cli.app import app
from jaxllm.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from jaxllm.models import convert as converting
from jaxllm.models.convert import convert
from jaxllm.models.loader import load
from jaxllm.models.registry import model_class
from sharding import make_mesh, partition_spec
from tests.engine import tiny
from tests.models.harness import GOLDENS

EIGHT = dict(num_attention_heads=8, num_key_value_heads=2)  # key-value heads fewer than four shards
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def write_source(name: str, directory: Path) -> Path:
    """A golden checkpoint with room for eight shards, or one of `tiny`'s kinds."""
    if name.startswith("tiny-"):
        return tiny.write_checkpoint(name.removeprefix("tiny-"), directory, **EIGHT)
    return Path(shutil.copytree(GOLDENS / name, directory))


def filled(directory: Path, mesh, dtype=jnp.float32) -> list[np.ndarray]:
    """Every parameter of the model on a mesh, whole and in order, with what each device holds."""
    checkpoint = open_checkpoint(directory)
    family = model_class(checkpoint.config)
    model = family(family.parse_config(checkpoint.config).for_shards(mesh.shape["tensor"]), dtype=dtype)
    load(model, checkpoint, shardings=lambda axes: NamedSharding(mesh, partition_spec(axes)))
    arrays = jax.tree.leaves(model)
    assert all(array.dtype == dtype for array in arrays)
    return [np.asarray(shard.data) for array in arrays for shard in array.addressable_shards]


def tokens(directory: Path, **options) -> list[list[int]]:
    with tiny.llm(directory, max_num_batched_tokens=32, token_rungs=(32,), **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(tiny.prompts(3), GREEDY)]


MODELS = ["tiny-llama", "tiny-gemma2", "phi3", "qwen2"]  # tied, fused in the checkpoint, with biases
TOKENS = [("tiny-llama", 2), ("tiny-gemma2", 4)]  # and both on one device, below


def main(root: Path) -> None:
    """In a process of its own: devices must be asked for before JAX starts."""
    jax.config.update("jax_num_cpu_devices", 4)
    for name in MODELS:
        for data, tensor in ((1, 1), (1, 2), (1, 4), (2, 2)):
            mesh = make_mesh(data=data, tensor=tensor)
            try:
                wanted = filled(root / name, mesh)
            except ConfigError:  # heads that so many shards cannot share
                continue
            for one, other in zip(wanted, filled(root / f"{name}-converted", mesh), strict=True):
                np.testing.assert_array_equal(one, other)
            print("same", name, data, tensor)
    for name, tensor in TOKENS:
        print(json.dumps(tokens(root / f"{name}-converted", tensor_parallel_size=tensor, load_format="orbax")))


def one_of_two(root: Path, address: str, process: int) -> None:
    """A process with two devices of four. Writes down what it has read of the model's bytes."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, 2, process)
    for data, tensor in ((1, 4), (2, 2)):  # a rank over both processes, and one each
        mesh = make_mesh(data=data, tensor=tensor)
        read = bytes_read()
        found = filled(root / "converted", mesh)
        (root / f"read-{tensor}-{process}").write_text(str(bytes_read() - read))
        for one, other in zip(filled(root / "source", mesh), found, strict=True):
            np.testing.assert_array_equal(one, other)


def bytes_read() -> int:
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return found[0]["values"][0]["value"] if found else 0


@pytest.mark.slow
def test_each_of_two_processes_reads_its_own_shards_alone(tmp_path, root, small_chunks):
    source = write_source("tiny-llama", tmp_path / "source")
    convert(open_checkpoint(source), tmp_path / "converted")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.models.test_convert", str(tmp_path), address]
    both = [subprocess.Popen([*command, str(process)], cwd=root, stderr=subprocess.PIPE) for process in range(2)]
    for one in both:
        errors = one.communicate(timeout=300)[1]
        assert one.returncode == 0, errors[-3000:]
    size = sum(path.stat().st_size for path in (tmp_path / "converted" / WEIGHTS).rglob("c/**/*") if path.is_file())
    for process in range(2):
        assert 0.5 * size < int((tmp_path / f"read-4-{process}").read_text()) < 0.7 * size
        assert size < int((tmp_path / f"read-2-{process}").read_text()) < 1.2 * size


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Arrays of many chunks, which only large models have else."""
    monkeypatch.setattr(orbax_source, "_LEAST_CHUNK", 64)
    monkeypatch.setattr(orbax_source, "_LARGEST_CHUNK", 1024)


def test_the_same_parameters_and_tokens_on_any_mesh(tmp_path, root, small_chunks):
    for name in MODELS:
        convert(open_checkpoint(write_source(name, tmp_path / name)), tmp_path / f"{name}-converted")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.models.test_convert", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    same = {tuple(line.split()[1:]) for line in lines if line.startswith("same")}
    assert {name for name, *_ in same} == set(MODELS) and {("tiny-llama", "1", "4"), ("phi3", "1", "2")} <= same
    found = [json.loads(line) for line in lines if line.startswith("[")]
    assert found == [tokens(tmp_path / name) for name, _ in TOKENS]
    assert found == [tokens(tmp_path / f"{name}-converted") for name, _ in TOKENS]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source("tiny-llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def converted(source, tmp_path) -> Path:
    convert(open_checkpoint(source), tmp_path / "converted")
    return tmp_path / "converted"


def test_the_command_writes_what_serves_by_itself(source, tmp_path):
    (source / "generation_config.json").write_text('{"temperature": 0.5}')
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a" / "b")])
    assert done.exit_code == 0, done.output
    shutil.move(tmp_path / "a" / "b", tmp_path / "moved")
    assert [path.name for path in (tmp_path / "a").iterdir()] == []
    assert tokens(tmp_path / "moved") == tokens(source)
    with LLM(tmp_path / "moved", **tiny.OPTIONS) as llm:
        assert llm.get_default_sampling_params().temperature == 0.5
        assert llm.chat([{"role": "user", "content": "the"}], GREEDY)[0].outputs[0].token_ids


def test_bfloat16_is_stored_as_it_is_and_restored_as_asked(source, tmp_path):
    import ml_dtypes

    half = Path(shutil.copytree(source, tmp_path / "half"))
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors")
    convert(open_checkpoint(half), tmp_path / "converted")
    checkpoint = open_checkpoint(tmp_path / "converted")
    assert {checkpoint.dtype(name).name for name in checkpoint.names()} == {"bfloat16"}
    for dtype in (jnp.float32, jnp.bfloat16):
        pairs = zip(filled(half, make_mesh(), dtype), filled(tmp_path / "converted", make_mesh(), dtype), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.array_equal(checkpoint.read(name), weights[name])
    part = np.empty((3, 5), np.float32)
    checkpoint.read_into(name, part, (slice(2, 5), slice(0, 5)))
    assert np.array_equal(part, weights[name][2:5, :5].astype(np.float32))


def test_any_part_is_read_as_numpy_cuts_it(source, tmp_path, small_chunks):
    convert(open_checkpoint(source), tmp_path / "converted")
    checkpoint, original = open_checkpoint(tmp_path / "converted"), open_checkpoint(source)
    random = np.random.default_rng(0)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        whole = original.read(name)
        np.testing.assert_array_equal(checkpoint.read(name), whole)
        for _ in range(20):
            bounds = [sorted(random.choice(size + 1, 2, replace=False)) for size in whole.shape]
            part = tuple(slice(int(start), int(stop)) for start, stop in bounds)
            frame = np.full([size + 2 for size in whole[part].shape], 7, np.float16)
            inside = tuple(slice(1, -1) for _ in part)
            checkpoint.read_into(name, frame[inside], part)
            np.testing.assert_array_equal(frame[inside], whole[part].astype(np.float16))
            frame[inside] = 7
            assert (frame == 7).all()  # and nothing beside it was written


def test_what_orbax_restores_is_the_same(converted, source):
    import orbax.checkpoint as ocp

    found = ocp.PyTreeCheckpointer().restore(converted / WEIGHTS)
    original, checkpoint = load_file(source / "model.safetensors"), open_checkpoint(converted)
    assert set(found) == set(checkpoint.names()) == set(original)
    for name, value in original.items():
        turned = name.endswith("_proj.weight") or name == "lm_head.weight"
        np.testing.assert_array_equal(found[name], value.T if turned else value)
        np.testing.assert_array_equal(checkpoint.read(name), value)


def test_the_chunks_of_a_large_array_suit_its_shards():
    for transposed in (False, True):
        for dealt in (0, 1):
            stored = StoredArray((28672, 8192), np.dtype("float16"), transposed, dealt)
            metadata = stored.metadata()
            chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            assert metadata["shape"] == ((8192, 28672) if transposed else (28672, 8192))
            axis = 1 - dealt if transposed else dealt
            assert (metadata["shape"][axis] // 16) % chunk[axis] == 0
            assert 4 << 20 < 2 * chunk[0] * chunk[1] <= 9 << 20


def largest(directory: Path) -> Path:
    return max((path for path in (directory / WEIGHTS).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def reword(path: Path) -> None:
    """Another letter: good JSON still, and of the same size."""
    before, _, after = path.read_text().rpartition("s")
    path.write_text(f"{before}t{after}")


def lengthen_text(path: Path) -> None:
    """Still good JSON."""
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize("which", [largest, lambda d: largest(d).parents[2] / "zarr.json", lambda d: d / MANIFEST])
@pytest.mark.parametrize("damage", [truncate, alter, lengthen, os.remove], ids=lambda damage: damage.__name__)
def test_damage_is_refused_with_the_files_name(converted, damage, which):
    path = which(converted)
    damage(path)
    if path.name == MANIFEST and damage is lengthen:
        path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError) as caught:
        tiny.llm(converted)
    assert path.name in str(caught.value) and str(converted) in str(caught.value)
    if path.name != MANIFEST:
        assert str(path) in str(caught.value)


def test_a_whole_chunk_in_anothers_place_is_refused(source, tmp_path, small_chunks):
    """Of another layer, and of another place in the same array."""
    convert(open_checkpoint(source), tmp_path / "converted")
    expected = tokens(tmp_path / "converted")
    layers = [tmp_path / "converted" / WEIGHTS / f"model.layers.{i}.mlp.down_proj.weight" / "c" for i in (0, 1)]
    chunks = [sorted(path for path in layer.rglob("*") if path.is_file()) for layer in layers]
    assert len(chunks[0]) > 1
    for one, other in ((chunks[0][1], chunks[1][1]), (chunks[0][0], chunks[0][-1])):
        contents = one.read_bytes(), other.read_bytes()
        assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
        one.write_bytes(contents[1])
        with pytest.raises(CheckpointError, match=f"{one}: altered: it holds another chunk"):
            tiny.llm(tmp_path / "converted")
        one.write_bytes(contents[0])
    assert tokens(tmp_path / "converted") == expected


def test_what_tokens_depend_on_is_checked_too(converted):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        path = converted / name
        content = path.read_bytes()
        for damage, words in ((reword, "altered"), (lengthen_text, "altered"), (os.remove, "")):
            damage(path)
            with pytest.raises((CheckpointError, ModelNotFoundError)) as caught:
                open_checkpoint(converted)
            assert name in str(caught.value) and str(converted) in str(caught.value) and words in str(caught.value)
            path.write_bytes(content)
    open_checkpoint(converted)


def test_sampling_defaults_and_templates_may_be_changed(source, tmp_path):
    original = Path(shutil.copytree(source, tmp_path / "original"))
    (original / "generation_config.json").write_text('{"temperature": 0.5}')
    (original / "chat_template.jinja").write_text("{{ messages[0].content }}")
    convert(open_checkpoint(original), tmp_path / "converted")
    (tmp_path / "converted" / "generation_config.json").write_text('{"temperature": 0.75}')
    (tmp_path / "converted" / "chat_template.jinja").write_text("Say: {{ messages[0].content }}")
    checkpoint = open_checkpoint(tmp_path / "converted")
    assert checkpoint.generation_config == {"temperature": 0.75}
    said = checkpoint.tokenizer().apply_chat_template([{"role": "user", "content": "the"}])
    assert said == "Say: the"


def test_the_format_before_is_read_and_others_are_refused(converted):
    def write(content: dict) -> None:
        content = {name: value for name, value in content.items() if name != "crc32"}
        (converted / MANIFEST).write_text(json.dumps({"crc32": orbax_source._crc32_of_content(content), **content}))

    content = json.loads((converted / MANIFEST).read_text())
    assert content["format"] == 4 and set(content["copied"]) == {
        "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    before = content | {"chunks": {name: size for name, (size, _) in content["chunks"].items()}}
    expected = tokens(converted)
    write(before | {"format": 3})
    assert tokens(converted) == expected
    write({name: value for name, value in before.items() if name != "copied"} | {"format": 2})
    lengthen_text(converted / "config.json")  # nothing is known of it
    assert tokens(converted) == expected
    for other in (1, 5):
        write(content | {"format": other})
        with pytest.raises(CheckpointError, match=f"format {other}; jaxllm reads formats 2 and 3 and 4: convert it"):
            open_checkpoint(converted)


def test_what_a_killed_conversion_left_is_named(source, tmp_path):
    left = tmp_path / ".converted.incomplete-abc"
    left.mkdir()
    (tmp_path / ".converted2.incomplete-abc").mkdir()
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "converted")])
    assert done.exit_code == 0, done.output
    assert f"{left}: left by" in done.stderr and "converted2" not in done.output
    left.rmdir()
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "converted")])
    assert isinstance(done.exception, ConfigError) and done.output == ""


@pytest.mark.parametrize("way", ["the working directory", "a link"])
def test_an_empty_directory_is_filled(source, tmp_path, monkeypatch, way):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    convert(open_checkpoint(source), Path("." if way == "the working directory" else "../link"))
    assert open_checkpoint(tmp_path / "empty").names()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_directories_that_cannot_be_made_are_refused(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", Path("/proc/nowhere/below")):
        with pytest.raises(ConfigError, match=f"directory='{path}': cannot be made"):
            convert(open_checkpoint(source), path)
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    with pytest.raises(ConfigError, match="must be no mount point"):
        convert(open_checkpoint(source), tmp_path / "converted")


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(open_checkpoint(source), tmp_path / "converted")
    assert list(tmp_path.iterdir()) == []


def test_what_was_killed_is_not_taken_for_whole(converted):
    (converted / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="not whole"):
        tiny.llm(converted)


def test_another_models_config_is_refused_with_all_names(converted):
    config, arrays = json.loads((converted / "config.json").read_text()), open_checkpoint(converted).arrays
    (converted / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "vocab_size": 301}))
    write_manifest(converted, arrays)
    with pytest.raises(CheckpointError) as caught:
        tiny.llm(converted)
    for part in ("missing: model.layers.2", "misshapen: lm_head.weight has shape (300, 32)"):
        assert part in str(caught.value)


def test_refusals(source, tmp_path, converted):
    with pytest.raises(CheckpointError, match="load_format='orbax'"):
        tiny.llm(source, load_format="orbax")
    with pytest.raises(CheckpointError, match=r"load_format='safetensors': .* is no Hugging Face directory"):
        tiny.llm(converted, load_format="safetensors")
    tiny.llm(source, load_format="safetensors").close()
    with pytest.raises(ConfigError, match="exists"):
        convert(open_checkpoint(source), converted)
    with pytest.raises(UnsupportedModelError, match="converted already"):
        convert(open_checkpoint(converted), tmp_path / "again")
    quantized = Path(shutil.copytree(source, tmp_path / "quantized"))
    weights = load_file(quantized / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].astype(np.int8)}, quantized / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"{name}.*int8"):
        convert(open_checkpoint(quantized), tmp_path / "new")
    config = json.loads((source / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        convert(open_checkpoint(quantized), tmp_path / "new")
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        convert(open_checkpoint("smollm2"), tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        one_of_two(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
