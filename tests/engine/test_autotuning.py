"""What XLA has timed on a kind of GPU is shipped and put where XLA looks for it."""

import io
import tarfile

import jax
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import autotuning
from jaxllm.engine.compile import Executables
from tests.engine import tiny

KIND = "NVIDIA H100 80GB HBM3"
FIRST, SECOND = f"{1:016x}/{2:032x}.pb", f"{1:016x}/{3:032x}.pb"


def fill(cache, **files):
    for name, content in files.items():
        path = cache / autotuning.FOLDER / {"first": FIRST, "second": SECOND}[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_what_one_machine_found_another_of_its_kind_gets(tmp_path):
    fill(tmp_path / "a", first=b"1", second=b"2")
    archive, count = autotuning.keep(tmp_path / "a", KIND, tmp_path)
    assert count == 2 and archive == autotuning.shipped(KIND, tmp_path)
    assert autotuning.seed(tmp_path / "b", KIND, tmp_path) == 2
    assert (tmp_path / "b" / autotuning.FOLDER / FIRST).read_bytes() == b"1"
    assert (tmp_path / "b" / autotuning.FOLDER / SECOND).read_bytes() == b"2"
    assert autotuning.seed(tmp_path / "b", KIND, tmp_path) == 0
    assert autotuning.seed(tmp_path / "c", "NVIDIA H200", tmp_path) == 0


def test_what_is_no_outcome_is_not_kept(tmp_path):
    fill(tmp_path / "a", first=b"1")
    (tmp_path / "a" / autotuning.FOLDER / FIRST).with_name("another.pb").write_bytes(b"2")
    archive, count = autotuning.keep(tmp_path / "a", KIND, tmp_path)
    assert count == 1 and list(autotuning.read(archive)) == [FIRST]


def test_an_engine_seeds_its_cache_before_it_compiles(checkpoint, monkeypatch):
    seeded = []

    def seed(directory, kind):
        seeded.append((directory, kind))
        raise InterruptedError

    def prepare(self, keys):
        raise AssertionError("it compiles before")

    monkeypatch.setattr(autotuning, "seed", seed)
    monkeypatch.setattr(Executables, "prepare", prepare)
    with pytest.raises(InterruptedError):
        tiny.llm(checkpoint("llama"))
    assert seeded == [(EngineConfig().cache_directory, jax.devices()[0].device_kind)]
    assert jax.config.jax_persistent_cache_enable_xla_caches == autotuning.FOLDER  # where JAX has XLA look


def test_a_machines_own_outcomes_stay(tmp_path):
    fill(tmp_path / "a", first=b"shipped")
    autotuning.keep(tmp_path / "a", KIND, tmp_path)
    fill(tmp_path / "b", first=b"own")
    assert autotuning.seed(tmp_path / "b", KIND, tmp_path) == 0
    assert (tmp_path / "b" / autotuning.FOLDER / FIRST).read_bytes() == b"own"


def test_archives_grow_and_are_the_same_for_the_same_outcomes(tmp_path):
    fill(tmp_path / "a", first=b"1")
    fill(tmp_path / "b", second=b"2")
    for data, caches in ((tmp_path / "x", "ab"), (tmp_path / "y", "ba")):
        data.mkdir()
        for cache in caches:
            archive, count = autotuning.keep(tmp_path / cache, KIND, data)
        assert count == 2
    assert (tmp_path / "x" / archive.name).read_bytes() == (tmp_path / "y" / archive.name).read_bytes()


def test_nothing_is_written_beside_the_cache(tmp_path):
    with tarfile.open(autotuning.shipped(KIND, tmp_path), "w:xz") as tar:
        for name in ("../outside.pb", f"/{FIRST}", f"../{FIRST}", "readme", FIRST):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo(SECOND)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert autotuning.seed(tmp_path / "cache", KIND, tmp_path) == 1
    assert [path.name for path in (tmp_path / "cache").rglob("*.pb*")] == [FIRST.partition("/")[2]]


@pytest.mark.parametrize("length", [0, 60, 1000, 15_000, -100])
def test_an_archive_that_was_cut_anywhere_is_told(tmp_path, caplog, length):
    archive = autotuning.shipped(KIND, tmp_path)
    archive.write_bytes(next(iter(autotuning.DATA.glob("*.tar.xz"))).read_bytes()[:length])
    autotuning.seed(tmp_path / "cache", KIND, tmp_path)
    assert "XLA will time its kernels anew" in caplog.text


@pytest.mark.parametrize("damage", ["torn archive", "a file for a directory"])
def test_what_cannot_be_put_is_told(tmp_path, caplog, damage):
    fill(tmp_path / "a", first=b"1")
    archive, _ = autotuning.keep(tmp_path / "a", KIND, tmp_path)
    if damage == "torn archive":
        archive.write_bytes(archive.read_bytes()[:50])
    else:
        (tmp_path / "b").write_text("")
    assert autotuning.seed(tmp_path / "b", KIND, tmp_path) == 0
    assert "XLA will time its kernels anew" in caplog.text


def test_shipped_archives_hold_outcomes():
    archives = list(autotuning.DATA.glob("*.tar.xz"))
    assert archives
    for archive in archives:
        outcomes = autotuning.read(archive)
        with tarfile.open(archive, "r:xz") as tar:
            assert len(tar.getnames()) == len(outcomes) > 0
        for name, content in outcomes.items():  # each names itself
            device, fusion = name.removesuffix(".pb").split("/")
            assert device.encode() in content and fusion.encode() in content
