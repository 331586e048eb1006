"""Compiled executables kept on disk whole, so that a later start neither traces nor lowers what has not changed.

JAX's own persistent cache is keyed by the lowered module, which has to be made first; for a step with Mosaic GPU
kernels that is seconds of Python for each rung, under the GIL. Here the key is what the lowered module is a function
of: this package's sources, the versions of JAX and of the device's compiler, XLA's flags, the engine's plan.
"""

import hashlib
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)

MOST_KEPT = 16  # plans whose executables stay on disk; the one used longest ago goes first
_PACKAGES = ("jaxllm", "pallas_kernels", "sharding")


_ROOT = Path(__file__).parents[2]


def source_files() -> list[Path]:
    """The Python and JSON files that decide what is compiled."""
    files = [path for package in _PACKAGES for path in (_ROOT / package).rglob("*") if path.suffix in (".py", ".json")]
    return sorted(files)


def fingerprint(*parts: Any) -> str:
    """A hash of everything that a compiled executable depends on; `parts` are told apart by their repr."""
    device = jax.devices()[0]
    digest = hashlib.sha256()
    for path in source_files():
        place = os.path.relpath(path, _ROOT)  # a file that moves makes another program
        digest.update(place.encode() + b"\0" + path.read_bytes() + b"\0")
    settings = {name: value for name, value in sorted(jax.config.values.items()) if "cache" not in name}
    flags = (os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", ""))
    versions = (jax.__version__, jaxlib.__version__, device.client.platform_version, device.device_kind)
    digest.update(repr((versions, flags, settings, len(jax.devices()), *parts)).encode())
    return digest.hexdigest()[:32]


class ExecutableStore:
    """A folder of executables of one fingerprint. Its files hold machine code and pickles: like JAX's compilation cache
    beside it, the folder must be writable by nobody but its user. Where it cannot be written, which is told, what is
    there is used and nothing is added."""

    def __init__(self, directory: Path, name: str):
        self.directory = directory / "executables" / name
        self._keeps = True
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.utime(self.directory)
        except OSError as error:
            self._keeps = False
            logger.warning("what is compiled is not kept for the next start: %s", error)
        else:
            _forget_oldest(self.directory.parent)

    def _path(self, key: Any) -> Path:
        return self.directory / hashlib.sha256(repr(key).encode()).hexdigest()[:32]

    def load(self, key: Any, devices: Iterable[jax.Device]) -> Any | None:
        """The executable of `key`, ready to run on `devices`; None if it is not there or cannot be read."""
        try:
            payload = self._path(key).read_bytes()
        except OSError:
            return None
        try:
            content, in_tree, out_tree = pickle.loads(payload)
            return serialize_executable.deserialize_and_load(
                content, in_tree, out_tree, execution_devices=list(devices)
            )
        except Exception as error:  # a torn or foreign file costs a compilation, nothing more
            logger.warning("%s: compiling %s again: %s", self._path(key), key, error)
            return None

    def save(self, key: Any, compiled: Any) -> None:
        """Keeps an executable; a full disk is told, not raised."""
        if not self._keeps:
            return
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            with tempfile.NamedTemporaryFile(dir=self.directory, delete=False) as file:
                file.write(payload)
            os.replace(file.name, self._path(key))
        except (OSError, ValueError, NotImplementedError) as error:
            logger.warning("%s was not kept for the next start: %s", key, error)


def _forget_oldest(parent: Path) -> None:
    """Removes the folders beyond the MOST_KEPT used last. Others may be doing the same."""

    def last_use(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0

    for path in sorted(parent.iterdir(), key=last_use, reverse=True)[MOST_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
