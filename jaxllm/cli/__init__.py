"""The `jaxllm` command."""

import sys


def main() -> None:
    """Entry point of the console script. Errors of jaxllm.errors end it with one line and status 2."""
    from jaxllm.errors import JaxllmError

    try:
        from jaxllm.cli.app import app

        app()
    except JaxllmError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        sys.exit(2)
