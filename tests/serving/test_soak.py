"""See tests/serving/soak.py."""

import pytest

from tests.serving.soak import soak


def _assert_sound(report) -> None:
    assert not report.wrong, report.wrong[:5]
    assert not report.logged, report.logged[:5]
    assert len(report.counts) == 8, report.counts


def test_clients_of_all_manners_for_a_while(model):
    _assert_sound(soak(model, 70, seed=1))


@pytest.mark.slow
def test_clients_of_all_manners_for_long(model):
    report = soak(model, 3000, seed=2)
    _assert_sound(report)
    half = len(report.memory) // 2
    assert max(report.memory[half:]) < min(report.memory[half:]) + 30, report.memory  # MB
