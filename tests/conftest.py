"""What every test shares: JAX on the CPU, one compilation cache for all workers and runs, and quick compilations."""

import contextlib
import gc
import os
import sys
from pathlib import Path

import pytest

from tests import compilation

ROOT = Path(__file__).resolve().parents[1]

# Before jax is imported by any test module.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

with contextlib.suppress(ImportError):  # the environment of tests/clients has no Hypothesis
    import hypothesis

    hypothesis.settings.register_profile("jaxllm", deadline=None)  # a busy machine is no failure
    hypothesis.settings.load_profile("jaxllm")


def pytest_configure(config: pytest.Config) -> None:
    """A plain run compiles quickly. What is compiled as for users: the slow tests, the default model, and everything
    where XLA_FLAGS is set, be it to nothing."""
    if config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", compilation.QUICK)


@pytest.fixture
def as_users_compile(monkeypatch) -> None:
    """Processes that the test starts compile as those of users do."""
    compilation.as_users(monkeypatch)


# Files whose tests take long each: they run first, so that none begins when the other worker has nothing left to do,
# and one after the other, so that what they share is compiled once.
FIRST = ("test_tensor_parallel", "test_smollm2", "test_documents", "test_notebooks", "test_offline_generate")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


MANY_MAPPINGS = 20_000  # the kernel allows a process 65,530; XLA:CPU's executables take dozens each, and crash beyond


@pytest.fixture(autouse=True, scope="module")
def executables_go():
    """What earlier tests have compiled goes once it takes much of what a process may map."""
    yield
    if "jax" in sys.modules and len(Path("/proc/self/maps").read_bytes().splitlines()) > MANY_MAPPINGS:
        import jax

        gc.collect()
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng():
    """A seeded numpy generator, new for each test."""
    import numpy as np

    return np.random.default_rng(0)
