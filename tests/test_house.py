"""The rules of the house: who imports whom, what is locked, what may be committed."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxllm", "pallas_kernels", "sharding")

# Which rooms each room may import, beside itself. A room is a top-level package, or a package or module in jaxllm.
# Read from the bottom: imports point downward only.
_FLOOR = {"pallas_kernels", "sharding", "errors", "config"}
_HOST = _FLOOR | {"core", "text", "checkpoint"}
_FRONT = _HOST | {"structured", "engine", "frontend"}
_DOORS = _FRONT | {"models", "llm", "async_llm", "jaxllm"}
MAY_IMPORT: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "sharding": set(),
    "errors": set(),
    "config": {"errors"},
    "core": {"errors", "config"},
    "text": {"errors", "config", "core"},
    "checkpoint": {"errors", "config", "core", "text"},
    "models": _HOST,
    "structured": {"errors", "config", "core", "text"},
    "engine": _HOST | {"models", "structured"},
    "frontend": _HOST | {"structured", "engine"},
    "async_llm": _FRONT,
    "llm": _FRONT | {"async_llm"},
    "jaxllm": _DOORS,
    "serving": _DOORS,
    "ray": _DOORS,
    "bench": _DOORS,
    "plan": _DOORS | {"bench"},
    "cli": _DOORS | {"serving", "ray", "bench", "plan"},
    "__main__": {"cli"},
}


def python_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def room_of(module: str) -> str:
    """`jaxllm.core.request` → `core`, `jaxllm` → `jaxllm`, `sharding.mesh` → `sharding`."""
    top, *rest = module.split(".")
    return rest[0] if top == "jaxllm" and rest else top


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> Iterator[str]:
    """Absolute names of every module that the file imports, wherever in it; `from jaxllm import core`: `jaxllm.core`.

    What stands under `if TYPE_CHECKING:` is left out: it names a type and imports nothing.
    """
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT.joinpath(*base.split("."), alias.name)
                yield f"{base}.{alias.name}" if inner.is_dir() or inner.with_suffix(".py").is_file() else base


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    yield node
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from walk(child)


def test_imports_point_downward():
    wrong = []
    for file in python_files():
        room = room_of(module_of(file))
        assert room in MAY_IMPORT, (
            f"{file.relative_to(ROOT)} is in the new room {room!r}: say in MAY_IMPORT what it may import"
        )
        for name in imports_of(file):
            if name.split(".")[0] in PACKAGES and room_of(name) != room and room_of(name) not in MAY_IMPORT[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_and_sharding_depend_on_jax_alone():
    allowed = set(sys.stdlib_module_names) | {"jax", "jaxlib", "numpy"}
    for file in python_files():
        own = file.relative_to(ROOT).parts[0]
        if own != "jaxllm":
            outside = {name.split(".")[0] for name in imports_of(file)} - allowed - {own}
            assert not outside, f"{file.relative_to(ROOT)} imports {outside}"


def test_core_imports_no_jax():
    for file in (ROOT / "jaxllm" / "core").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports_of(file)}
        assert not tops & {"jax", "jaxlib", "flax"}, f"{file.relative_to(ROOT)} imports {tops}"
    modules = [module_of(file) for file in sorted((ROOT / "jaxllm" / "core").rglob("*.py"))]
    assert not loaded_by(*modules) & {"jax", "jaxlib", "flax"}


def test_no_torch():
    for file in python_files():
        assert not {name.split(".")[0] for name in imports_of(file)} & {"torch", "transformers", "tensorflow"}, file


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    homes = importlib.metadata.packages_distributions()

    def home(name: str, declared: set[str]) -> str:
        """The package that a top-level module comes from; of a namespace that several share, one that is declared."""
        candidates = [canonicalize_name(candidate) for candidate in homes.get(name, [name])]
        return next((candidate for candidate in candidates if candidate in declared), candidates[0])

    def imported_by(files: list[Path], declared: set[str]) -> set[str]:
        names = {name.split(".")[0] for file in files for name in imports_of(file)}
        names -= {*sys.stdlib_module_names, *PACKAGES, "tests", "jaxlib"}
        return {home(name, declared) for name in names}

    def declared_by(lines: list[str]) -> set[str]:
        return {canonicalize_name(Requirement(line).name) for line in lines}

    project = pyproject()["project"]
    needed, extras = declared_by(project["dependencies"]), project["optional-dependencies"]
    everything = needed | declared_by([line for lines in extras.values() for line in lines])
    assert imported_by(python_files(), everything) <= everything
    assert needed <= imported_by(python_files(), needed), "nothing imports them"
    of_tests = needed | declared_by(extras["dev"]) | declared_by(pyproject()["dependency-groups"]["clients"])
    assert imported_by(sorted((ROOT / "tests").rglob("*.py")), of_tests) <= of_tests


def test_importing_jaxllm_is_light():
    heavy = {"jax", "jaxlib", "flax", "torch", "transformers", "tokenizers", "fastapi", "matplotlib", "scipy"}
    assert not loaded_by("jaxllm") & heavy


def loaded_by(*modules: str) -> set[str]:
    """Top-level modules in sys.modules after importing these in a new interpreter."""
    code = f"import sys, {', '.join(modules)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_public_names_and_the_console_script_exist():
    jaxllm = importlib.import_module("jaxllm")
    for name in jaxllm.__all__:
        assert getattr(jaxllm, name) is not None
    with pytest.raises(AttributeError):
        jaxllm.no_such_name  # noqa: B018
    module, function = pyproject()["project"]["scripts"]["jaxllm"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


# --- locks -----------------------------------------------------------------------------------------------------------

EXTRAS = ("dev", "serve", "otel", "orbax", "cuda13", "tpu", "ray", "bench")


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock(name: str) -> dict[str, str]:
    """{package: version} of requirements/NAME.lock; asserts that it holds nothing but pins and comments."""
    pins = {}
    for line in (ROOT / "requirements" / f"{name}.lock").read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.+!-]+)", line)
            assert match, f"requirements/{name}.lock: {line!r} is no plain pin"
            pins[canonicalize_name(match[1])] = match[2]
    return pins


def assert_satisfied(requirements: list[str], pins: dict[str, str], name: str) -> None:
    for requirement in map(Requirement, requirements):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in requirements/{name}.lock: run scripts/lock"
        assert requirement.specifier.contains(version), f"{requirement} against {version}: run scripts/lock"


@pytest.mark.parametrize("name", ["base", "build", *EXTRAS])
def test_locks_agree_with_pyproject(name):
    project, pins = pyproject(), lock(name)
    if name == "build":
        assert_satisfied(project["build-system"]["requires"], pins, name)
    else:
        assert_satisfied(project["project"]["dependencies"], pins, name)
        assert_satisfied(project["project"]["optional-dependencies"].get(name, []), pins, name)
    shared = pins.keys() & lock("base").keys()
    assert {k: pins[k] for k in shared} == {k: lock("base")[k] for k in shared}
    assert name == "build" or lock("base").keys() <= pins.keys()
    assert not pins.keys() & {"torch", "transformers", "tensorflow"}


def test_every_extra_is_locked():
    assert set(pyproject()["project"]["optional-dependencies"]) == set(EXTRAS)


def test_the_default_models_package_is_pinned_once():
    pin = (ROOT / "requirements" / "model.txt").read_text().strip()
    assert f'"{pin}"' in (ROOT / "jaxllm" / "checkpoint" / "resolve.py").read_text()


# --- what is committed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_file_is_tracked(tracked):
    large = [f"{file.relative_to(ROOT)}: {file.stat().st_size}" for file in tracked if file.stat().st_size > 1_000_000]
    assert not large, large


# Character classes keep the patterns from finding themselves.
REGISTRY_HOST = re.compile(r"python[h]osted|py[p]i\.org|npm[j]s\.(org|com)|deb[i]an\.org")
MACHINE_PATH = re.compile(r"(?<![\w.])/(home/[a-z]|Users/[A-Z]|ro[o]t/[.]|op[t]/wheels|wo[r]k/(main|steering|[.]))")


def test_no_registry_host_and_no_machine_path_is_named(tracked):
    found = []
    for file in tracked:
        data = file.read_bytes()
        if b"\0" not in data[:8192]:
            for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
                if REGISTRY_HOST.search(line) or MACHINE_PATH.search(line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
