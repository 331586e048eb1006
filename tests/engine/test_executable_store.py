"""Executables that outlive their process: same results, no tracing, nothing wrong from a damaged or stale file."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine import executable_store
from jaxllm.engine.compile import Executables
from jaxllm.engine.executable_store import ExecutableStore, fingerprint
from jaxllm.engine.step import SlotState

never_seen = [0.0]  # a constant in the code, so that JAX's own cache has no such executable


@pytest.fixture(autouse=True)
def _another_constant():
    never_seen[0] = random.SystemRandom().random()


def _lower(key: int):
    constant = never_seen[0]

    def step(leaves, caches, state):
        caches = [cache.at[key].add(leaves[0] + 0 * (cache[key] + constant)) for cache in caches]
        return caches, SlotState(state.num_computed + key, state.page_tables)

    return jax.jit(step, donate_argnums=(1,)).lower(*_arguments())


def _arguments():
    state = SlotState(jnp.zeros(3, jnp.int32), (jnp.ones((3, 2), jnp.int32),))
    return [jnp.float32(2.0)], [jnp.ones(4), jnp.ones(4)], state


def _executables(store: ExecutableStore, lower=_lower) -> Executables:
    return Executables(lower, store=(store, jax.devices()[:1]))


def _no_lowering(key):
    raise AssertionError(f"{key} was lowered")


@pytest.fixture
def store(tmp_path) -> ExecutableStore:
    return ExecutableStore(tmp_path, "one")


def test_a_second_process_neither_traces_nor_lowers(store):
    _executables(store).get(2)
    second = _executables(ExecutableStore(store.directory.parents[1], "one"), _no_lowering)
    caches, state = second.get(2)(*_arguments())
    assert second.num_restored == 1
    np.testing.assert_array_equal(caches[1], [1, 1, 3, 1])
    np.testing.assert_array_equal(state.num_computed, [2, 2, 2])


def test_donation_is_kept(store):
    _executables(store).get(1)
    arguments = _arguments()
    _executables(store, _no_lowering).get(1)(*arguments)
    assert all(cache.is_deleted() for cache in arguments[1])


def test_what_comes_from_jaxs_own_cache_is_not_kept_again(tmp_path):
    """A copy of it would lack its functions on CPU."""
    first, second = (ExecutableStore(tmp_path, name) for name in ("first", "second"))
    _executables(first).get(1)
    _executables(second).get(1)(*_arguments())
    assert len(list(first.directory.iterdir())) == 1 and not list(second.directory.iterdir())


def test_keys_do_not_meet(store):
    _executables(store).get(1)
    with pytest.raises(AssertionError, match="2 was lowered"):
        _executables(store, _no_lowering).get(2)


def test_another_fingerprint_finds_nothing(store, tmp_path):
    _executables(store).get(1)
    assert ExecutableStore(tmp_path, "two").load(1, jax.devices()[:1]) is None


@pytest.mark.parametrize("damage", [b"", b"not a pickle", None])
def test_a_damaged_file_is_compiled_again(store, damage):
    _executables(store).get(1)
    (path,) = store.directory.iterdir()
    path.write_bytes(path.read_bytes()[:-50] if damage is None else damage)
    again = _executables(store)
    caches, _ = again.get(1)(*_arguments())
    assert again.num_restored == 0
    np.testing.assert_array_equal(caches[0], [1, 3, 1, 1])


def test_only_the_latest_plans_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(executable_store, "MOST_KEPT", 3)
    for index in range(5):
        ExecutableStore(tmp_path, str(index))
    assert len(list((tmp_path / "executables").iterdir())) <= 4


def test_the_fingerprint_follows_sources_flags_and_plan(tmp_path, monkeypatch):
    before = fingerprint("plan")
    assert before == fingerprint("plan") != fingerprint("another plan")
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
        assert fingerprint("plan") != before
    extra = tmp_path / "extra.py"
    extra.write_text("")
    files = executable_store.source_files()
    monkeypatch.setattr(executable_store, "source_files", lambda: [*files, extra])
    assert fingerprint("plan") != before


@pytest.mark.parametrize("filled", [False, True])
def test_a_folder_that_cannot_be_written_is_told_and_still_read(tmp_path, monkeypatch, caplog, filled):
    if filled:
        _executables(ExecutableStore(tmp_path, "a")).get(1)

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    for name in ("utime", "mkdir", "replace"):  # root may write anywhere
        monkeypatch.setattr(executable_store.os, name, read_only)
    executables = _executables(ExecutableStore(tmp_path, "a"))
    executables.get(1)
    assert executables.num_restored == filled
    assert caplog.text.count("is not kept for the next start") == 1
