"""The search for what fits: right for every growing (falling) peak, with few simulations."""

from hypothesis import given
from hypothesis import strategies as st

from titan_adam_mini.memory.fit import Found, fewest, largest

sizes = st.integers(0, 10**10)
LIMIT = 300


@given(st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.integers(1, 2 * 10**11), st.integers(1, LIMIT))
def test_largest_is_that_of_trying_all(one: tuple[int, int], two: tuple[int, int], room: int, start: int) -> None:
    calls = []

    def peak(value: int) -> int:
        calls.append(value)
        assert value % 4 == 0
        return max(base + slope * value // 100 for base, slope in (one, two))

    found = largest(peak, room, 4, 4 * start, 4 * LIMIT)
    tried = len(calls)
    fitting = [value for value in range(4, 4 * LIMIT + 1, 4) if peak(value) <= room]
    assert found.value == max(fitting, default=None)
    assert found.peak == (peak(found.value) if found.value else None)
    beyond = (found.value or 0) + 4
    assert found.beyond == (peak(beyond) if beyond <= 4 * LIMIT else None)
    assert tried == len(set(calls[:tried])) <= 14


@given(st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.integers(1, 2 * 10**11), st.integers(1, LIMIT))
def test_fewest_is_that_of_trying_all(one: tuple[int, int], two: tuple[int, int], room: int, start: int) -> None:
    calls = []

    def peak(value: int) -> int:
        calls.append(value)
        return int(max(base + 100 * share / value for base, share in (one, two)))

    found = fewest(peak, room, 1, start, LIMIT)
    tried = len(calls)
    fitting = [value for value in range(1, LIMIT + 1) if peak(value) <= room]
    assert found.value == min(fitting, default=None)
    assert found.peak == (peak(found.value) if found.value else None)
    assert tried == len(set(calls[:tried])) <= 14


def test_a_straight_line_takes_three_looks() -> None:
    calls = []

    def peak(value: int) -> int:
        calls.append(value)
        return 1000 + 7 * value

    assert largest(peak, 1000 + 7 * 500 + 3, 1, 1, 10**6) == Found(500, 4500, 4507)
    assert len(calls) <= 4
