"""The `jaxllm` command."""

import contextlib
import os
import sys
import threading

_NEEDS_ENGINE = ("generate", "chat")


def main() -> None:
    """Entry point of the console script. Errors of jaxllm.errors end it with one line and status 2.

    Importing JAX is most of what a short run costs, so it begins before the command line is even parsed.
    """
    engine = len(sys.argv) > 1 and sys.argv[1] in _NEEDS_ENGINE and "--help" not in sys.argv
    if engine:
        preload()
    status = _run()
    if engine:
        _leave(status)
    sys.exit(status)


def _run() -> int:
    from jaxllm.errors import JaxllmError

    try:
        from jaxllm.cli.app import app

        app()
    except JaxllmError as error:
        sys.stderr.write(f"jaxllm: {error}\n")  # in one piece: other threads write, too
        return 2
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def _leave(status: int) -> None:
    """Ends the process at once.

    A plain exit would join the threads that compile and unload JAX, which takes a second for nothing: the answer has
    been printed. Files of the compilation cache are written under another name and renamed, so none is left half done.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


_preloading: threading.Thread | None = None


def preload() -> None:
    """Starts to import the engine on a thread of its own."""
    global _preloading
    _preloading = threading.Thread(target=_import_engine, name="preload", daemon=True)
    _preloading.start()


def _import_engine() -> None:
    with contextlib.suppress(Exception):  # the command imports it again and reports what is wrong
        from jaxllm.cli.flags import num_devices
        from jaxllm.engine import platform

        platform.configure(num_devices(sys.argv))  # JAX reads it when it is asked for devices
        import jax

        # Several processes have to meet before, and where the engine gets a process of its own the devices are its.
        if not any(word.startswith(("--coordinator-address", "--engine-process")) for word in sys.argv):
            jax.devices()
        import jaxllm.engine.build  # noqa: F401


def wait_for_preload() -> None:
    """Blocks until `preload` is done: two threads must not import JAX's circular modules at the same time."""
    if _preloading is not None:
        _preloading.join()
