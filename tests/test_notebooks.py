"""The notebooks run from top to bottom in a kernel of this environment, and say what they promise. Their engines
have smaller sizes than by default (`tests/smollm2.py`), so that less is compiled."""

import re
from pathlib import Path

import pytest

from tests.smollm2 import PRELUDE

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def run(name: str, monkeypatch) -> tuple[list[str], list[str]]:
    """Executes a notebook; the source of each code cell and what it printed. A cell that raises fails the test."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel before one of the user's
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "commit it without outputs"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PRELUDE))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    _, *cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout") for cell in cells
    ]
    return [cell.source for cell in cells], printed


def test_quickstart(monkeypatch, as_users_compile):
    _, printed = run("quickstart.ipynb", monkeypatch)
    _, _, completions, streamed, reply, seeds, samples, speed = printed
    assert "Paris" in completions
    assert len(streamed.split()) > 3 and reply.strip()
    first, second, again = (line.split(" ", 1)[1] for line in seeds.strip().splitlines())
    assert first == again != second
    assert len(set(samples.strip().splitlines())) == 3
    assert len(re.findall(r"[\d.]+ tokens/s", speed)) == 3


def test_tpu_vm(monkeypatch, as_users_compile):
    (install, *_), printed = run("tpu_vm.ipynb", monkeypatch)
    _, devices, ready, labels, stats = printed
    assert 'EXTRA = "tpu"' in install and "WARNING: JAX sees no TPU" in devices
    assert "1 x" in devices and ready.count("after") == 2 and labels.startswith("32 prompts")
    assert re.search(r"late_compilations +0", stats)


def test_colab(monkeypatch, as_users_compile):
    _, printed = run("colab.ipynb", monkeypatch)
    found, device, answers, alternatives, samples = printed
    assert found.startswith("This runtime has ") and "WARNING" in device
    assert device.startswith("cpu") and len(answers.split()) > 3
    assert len(re.findall(r"^[0-9]+ \{", alternatives, re.MULTILINE)) == 3 and len(samples.splitlines()) == 3
