"""XLA's settings, chosen by measurement, in one place. To be applied before JAX touches a device."""

import contextlib
import ctypes
import os
import sys

# JAX takes three quarters of an accelerator's memory by default. The engine plans `memory_utilization` of what JAX may
# use, and cuBLAS, NCCL and executables need some outside.
MEMORY_FRACTION = "0.95"


def configure() -> None:
    """Sets what the user's environment has not set."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)


def trim_memory() -> None:
    """Gives freed memory back to the system: compiling leaves some 100 MB an executable in glibc's arenas."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc has no such function
            ctypes.CDLL(None).malloc_trim(0)
