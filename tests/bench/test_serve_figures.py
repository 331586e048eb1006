"""The figures of online serving, of requests whose times are known."""

import pytest

from jaxllm.bench.serve import RateResult, ServeWork, Spread, _Times, median_of
from jaxllm.errors import InvalidRequestError


def test_a_requests_figures():
    times = _Times(arrival=10.0, outputs=[10.5, 10.75, 11.5], num_tokens=5)  # two outputs brought two tokens each
    assert times.figures() == {"ttft": 0.5, "tpot": 1.0 / 4, "e2el": 1.5}
    assert _Times(10.0, [10.5], 1).figures() == {"ttft": 0.5, "tpot": 0.0, "e2el": 0.5}


def test_a_spread():
    spread = Spread.of([float(n) for n in range(101)])
    assert (spread.mean, spread.p50, spread.p90, spread.p99) == (50, 50, 90, pytest.approx(99))
    assert Spread.of([]) == Spread(0, 0, 0, 0)


def test_medians_go_figure_by_figure():
    spreads = [Spread(1, 9, 5, 7), Spread(2, 8, 4, 7), Spread(3, 1, 6, 1)]
    assert median_of(spreads) == Spread(2, 8, 5, 7)
    nested = [RateResult(n, Spread(n, 0, 0, 0), None) for n in (3.0, 1.0, 2.0)]  # type: ignore[arg-type]
    assert median_of(nested) == RateResult(2.0, Spread(2.0, 0, 0, 0), None)  # type: ignore[arg-type]


def test_work_is_checked():
    with pytest.raises(InvalidRequestError, match="rate="):
        ServeWork(rates=(4.0, -1.0))
    with pytest.raises(InvalidRequestError, match=r"goodput='itl:0\.1'"):
        ServeWork(rates=(4.0,), goodput={"itl": 0.1})
