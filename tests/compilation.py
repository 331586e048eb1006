"""How XLA:CPU compiles in tests."""

import os

import pytest

# The suite waits for its compiler more than for anything else. Without LLVM's optimization, and with XLA's older
# emitters, which set up no MLIR context for each loop, what tiny models need takes little more than half the processor
# time; what the default model's thirty layers need takes longer, so its tests compile as users do.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


def as_users(patch: pytest.MonkeyPatch) -> None:
    """Processes that are started from now on compile as those of users do, unless XLA_FLAGS is the user's own."""
    if os.environ.get("XLA_FLAGS") == QUICK:
        patch.delenv("XLA_FLAGS")
