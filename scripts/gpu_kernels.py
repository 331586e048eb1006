#!/usr/bin/env python3
"""Mosaic GPU kernels made into machine code for an H100 that is not there: what does ptxas say of them?

    PYTHONPATH=. python scripts/gpu_kernels.py [--only TEXT] [--tokens 256 ...] [--decodes 8 256 ...] [--shards N]

Needs the packages of the extras dev and cuda13 and a C compiler, and neither a GPU nor its driver: a library of a few
lines stands for the driver and says that a GPU of compute capability 9.0 is there. For each published model that has
TEXT in its name it lowers the first two layers of steps of so many tokens, and prints a line for each kernel: registers
a thread, and bytes that do not fit into them (spilled). Lowering alone does not tell that ptxas takes a kernel. Exit
status 1 if it refuses one.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? 9 : which == 76 ? 0 : 132; /* compute capability, major and minor */
  return 0;
}
"""
DUMPS = "JAXLLM_KERNEL_DUMPS"  # set in the process that has the library for a driver
TOLD = re.compile(r"Used (\d+) registers"), re.compile(r"(\d+) bytes spill stores")  # in ptxas' output


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: scripts/setup dev cuda13")
    return Path(next(iter(spec.submodule_search_locations)))


def run_with_driver() -> int:
    """This program again, where the library and the places of CUDA's programs are known."""
    cuda = package("nvidia") / "cu13"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "driver.c")
        source.write_text(DRIVER)
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", Path(directory, "libcuda.so.1"), source], check=True)
        dumps = Path(directory, "dumps")
        dumps.mkdir()
        settings = {
            "LD_LIBRARY_PATH": directory,
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_CUDA_ROOT": str(cuda),
            "MOSAIC_GPU_RUNTIME_LIB_PATH": str(package("jax_cuda13_plugin") / "libmosaic_gpu_runtime.so"),
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_TO": str(dumps),
            DUMPS: str(dumps),
        }
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | settings).returncode


def kernels(module_text: str) -> Iterator[bytes]:
    """What Mosaic's calls in a lowered module hold."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    def calls(operation):
        for block in (block for region in operation.regions for block in region.blocks):
            for each in block.operations:
                if "custom_call" in each.operation.name:
                    attributes = each.operation.attributes
                    if "mosaic_gpu" in str(attributes["call_target_name"]):
                        yield next(attributes[name] for name in attributes if "backend_config" in str(name))
                yield from calls(each.operation)

    with mlir.make_ir_context():
        for config in calls(ir.Module.parse(module_text).operation):
            yield ir.StringAttr(ir.DictAttr(config)["module"]).value_bytes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For C++ that writes what it has made to the terminal."""
    kept = [os.dup(number) for number in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nothing, number)
        yield
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


class Compiler:
    """Mosaic's own."""

    def __init__(self, dumps: Path):
        self._library = ctypes.CDLL(str(package("jax_plugins.xla_cuda13") / "xla_cuda_plugin.so"))
        self._library.MosaicGpuCompile.restype = ctypes.c_void_p
        self._dumps = dumps

    def __call__(self, kernel: bytes) -> tuple[str, ...]:
        """Its name and what ptxas tells of it, "refused" where it tells nothing."""
        before = set(self._dumps.iterdir())
        with quiet():  # it ends with loading the kernel, which no driver does here
            self._library.MosaicGpuCompile(kernel, len(kernel))
        made = [path for path in self._dumps.iterdir() if path not in before]
        text = "\n".join(path.read_text() for path in made if path.suffix == ".ptxas")
        name = made[0].name.split(".")[0].rsplit("_", 1)[0] if made else "?"
        found = (pattern.search(text) for pattern in TOLD)
        return name, *(match[1] if match else "refused" for match in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models with this in their name")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 2048], choices=(256, 2048))
    parser.add_argument("--decodes", type=int, nargs="*", default=[8, 256], choices=(8, 256))
    parser.add_argument("--shards", type=int, default=1)
    given = parser.parse_args()
    if DUMPS not in os.environ:
        raise SystemExit(run_with_driver())

    from jaxllm.engine.executables import Forward
    from jaxllm.engine.lowering_process import Exporting
    from tests.gpu_steps import PUBLISHED, step_arguments

    compiler, refused = Compiler(Path(os.environ[DUMPS])), False
    print("| model | step | kernel | registers | bytes spilled |\n|---|---|---|---|---|")
    for model in (model for model in PUBLISHED if given.only.lower() in model.lower()):
        steps = [Forward(count, True) for count in given.decodes] + [Forward(count) for count in given.tokens]
        for step in steps:
            arguments = step_arguments(given.shards, hf=PUBLISHED[model], layers=2)
            text = Exporting(*arguments, "cuda")(step).exported.mlir_module()
            what = f"{step.num_tokens} {'decodes' if step.decodes_only else 'tokens'}"
            for found in dict.fromkeys(map(compiler, kernels(text))):
                refused |= "refused" in found
                print(f"| {model} | {what} | {' | '.join(found)} |", flush=True)
    raise SystemExit(1 if refused else 0)


if __name__ == "__main__":
    main()
