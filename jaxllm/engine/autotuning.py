"""XLA's choices among its kernels on a kind of GPU, as data.

XLA times its kernels for a product on the device before it takes one, and JAX keeps the outcomes, a small file each, in
the compilation cache. What was found on a kind of GPU, for the shapes of the models that were measured there, is
shipped, so that the first start on another machine of the kind neither times them again nor chooses otherwise. A file
is named by hashes of the device's properties, the compiler and the fusion: one that does not fit is not found, no more.
"""

import io
import logging
import lzma
import os
import re
import secrets
import tarfile
from pathlib import Path

import jaxlib

logger = logging.getLogger(__name__)

FOLDER = "xla_gpu_per_fusion_autotune_cache_dir"  # JAX's name, in the compilation cache
DATA = Path(__file__).parent / "autotuned"
_FILE = re.compile(r"[0-9a-f]{16}/[0-9a-f]{32}\.pb")


def shipped(device_kind: str, data: Path = DATA) -> Path:
    """Where the outcomes of a `jax.Device.device_kind` are with this jaxlib, if there are any."""
    name = re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")
    return data / f"{name}-jaxlib-{jaxlib.__version__}.tar.xz"


def read(archive: Path) -> dict[str, bytes]:
    """Outcomes by the name of their file; of an archive that is not there, none."""
    if not archive.exists():
        return {}
    with tarfile.open(archive, "r:xz") as tar:
        files = [member for member in tar if member.isfile() and _FILE.fullmatch(member.name)]
        return {member.name: tar.extractfile(member).read() for member in files}  # type: ignore[union-attr]


def seed(directory: Path, device_kind: str, data: Path = DATA) -> int:
    """Puts what is shipped for the device into the compilation cache `directory`, where it has no outcome of its own.
    Returns how many there were to put; a directory that cannot be written is told, not raised."""
    added = 0
    try:
        for name, content in read(shipped(device_kind, data)).items():
            path = directory / FOLDER / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, content)
                added += 1
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        logger.warning("XLA will time its kernels anew: %s", error)
    return added


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: another process may be compiling with the same cache."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    partial.write_bytes(content)
    os.replace(partial, path)


def keep(directory: Path, device_kind: str, data: Path = DATA) -> tuple[Path, int]:
    """Adds the outcomes in the compilation cache `directory` to what is shipped for the device. The same outcomes make
    the same archive. Returns it, and how many it holds."""
    archive = shipped(device_kind, data)
    folder = directory / FOLDER
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.pb")]
    kept = read(archive) | {name: (folder / name).read_bytes() for name in names if _FILE.fullmatch(name)}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz", preset=9) as tar:
        for name in sorted(kept):
            member = tarfile.TarInfo(name)
            member.size = len(kept[name])
            tar.addfile(member, io.BytesIO(kept[name]))
    _write(archive, content.getvalue())
    return archive, len(kept)
