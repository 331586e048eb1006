"""The engine's fixtures serve the front doors too."""

from tests.engine.conftest import checkpoint, engine, truth  # noqa: F401
