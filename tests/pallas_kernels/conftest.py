"""What all tests of kernels share."""

import pytest


@pytest.fixture(autouse=True)
def no_races(request):
    """Pallas' interpreters only print the races that they find: where one was, the test fails. In modules that have
    `INTERPRET`; what others print is theirs."""
    capfd = request.getfixturevalue("capfd") if hasattr(request.module, "INTERPRET") else None
    yield
    assert capfd is None or "RACE DETECTED" not in capfd.readouterr().out
