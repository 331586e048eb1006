"""What all tests of kernels share."""

import pytest


@pytest.fixture(autouse=True)
def no_races(capfd):
    """Pallas' interpreters only print the races that they find: where one was, the test fails."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out
