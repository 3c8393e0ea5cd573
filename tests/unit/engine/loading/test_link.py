"""How the time of overlapping loads is divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.engine.loading.speeds import SharedLink


def test_a_load_alone_is_given_all_the_time() -> None:
    link = SharedLink()
    for begin_s, end_s in ((5.0, 7.0), (100.0, 100.5)):
        assert link.end(link.begin(begin_s), end_s) == pytest.approx(end_s - begin_s)


def test_two_loads_at_a_time_are_given_half_each() -> None:
    link = SharedLink()
    first, second = link.begin(0.0), link.begin(1.0)
    assert link.end(first, 3.0) == pytest.approx(1.0 + 2.0 / 2)
    assert link.end(second, 4.0) == pytest.approx(2.0 / 2 + 1.0)


@given(st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(0, 5), st.booleans()), max_size=50))
def test_all_loads_together_are_given_the_time_in_which_any_ran(happenings: list[tuple[float, int, bool]]) -> None:
    link = SharedLink()
    now = busy_s = own_s = 0.0
    loads: list[float] = []
    for pause_s, index, begins in happenings:
        now += pause_s
        busy_s += pause_s if loads else 0.0
        if begins:
            loads.append(link.begin(now))
        elif loads:
            own_s += link.end(loads.pop(index % len(loads)), now)
    own_s += sum(link.end(began, now) for began in loads)
    assert own_s == pytest.approx(busy_s, abs=1e-9)
