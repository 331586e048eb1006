"""How long those who are turned away are told to wait."""

import pytest

from jaxllm.serving import admission
from jaxllm.serving.errors import ApiError


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        @classmethod
        def monotonic(cls) -> float:
            return cls.now

    monkeypatch.setattr(admission, "time", Clock)
    return Clock


def retry_after(door: admission.Admission) -> int:
    with pytest.raises(ApiError) as caught:
        door.enter(1, 1)
    return caught.value.retry_after


def test_the_rate_is_of_the_time_in_which_there_was_work(clock):
    door = admission.Admission(2, 0, 1000)
    door.enter(1, 1).leave()
    clock.now += 29  # nothing was asked for meanwhile: says nothing of how fast samples end
    stays = [door.enter(1, 1), door.enter(1, 1)]
    assert retry_after(door) == 1
    clock.now += 4
    stays.pop().leave()
    stays.append(door.enter(1, 1))
    assert retry_after(door) == 4  # one sample in four seconds
    clock.now += 56
    assert retry_after(door) == 1  # none in the last half minute
    stays.pop().leave()
    stays.append(door.enter(1, 1))
    assert retry_after(door) == 30
