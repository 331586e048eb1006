"""Python's cyclic garbage collector, kept from stopping the loop over steps.

A full collection walks every container of the process, and importing and tracing with JAX leaves a quarter of a million
even for a tiny model: 0.1 to 0.2 s in which nothing is launched. Requests themselves make hardly any cyclic garbage. So
what the start has left is frozen (taken out of all later collections), and the young generation may grow larger than a
step's rows.
"""

import contextlib
import gc
from collections.abc import Iterator

# Containers made, less those freed, before a collection; young collections before one of the next generation. A step of
# 256 rows keeps about a thousand, which Python's 700 would collect, and with them run JAX's callback, at every step.
THRESHOLD = (50_000, 20, 20)
# For a server: a request that fails may leave some forty containers in cycles, and to free 50,000 takes 0.13 s, in
# which no stream goes on. A hundred streams keep less than this: without such requests there is nothing to collect.
SERVERS_THRESHOLD = (20_000, 20, 20)

INTERPRETERS_OWN = 1000  # Python freezes a few hundred containers itself when it starts


def freeze(threshold: tuple[int, int, int] = THRESHOLD) -> None:
    """For a process that is the engine's own, or a server's, when it has started."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*threshold)


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """For a while in a process that is somebody else's: it gets its heap and its thresholds back afterwards.

    Without a collection before, which would cost what it is to save: garbage of before waits till after.
    """
    before = gc.get_threshold()
    thaw = gc.get_freeze_count() < INTERPRETERS_OWN  # what somebody else has frozen stays so
    if thaw:
        gc.freeze()
    if before[0]:  # 0 is off, which is better still
        gc.set_threshold(*map(max, before, THRESHOLD))
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if thaw:
            gc.unfreeze()
