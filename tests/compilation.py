"""How XLA:CPU compiles in tests."""

import os

import pytest

# The suite waits for its compiler more than for anything else. Without LLVM's optimization, and with XLA's older
# emitters, which set up no MLIR context for each loop, what two layers need takes little more than half the time. (Of
# thirty layers it takes longer: their loops then make up one LLVM module.)
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def as_users(patch: pytest.MonkeyPatch) -> None:
    """Processes that are started from now on compile as those of users do, unless XLA_FLAGS is the user's own."""
    if os.environ.get("XLA_FLAGS") == QUICK:
        patch.delenv("XLA_FLAGS")
