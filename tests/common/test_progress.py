import pytest

from fedmmkt.common import progress
from fedmmkt.common.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test sets it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_short_stage_says_nothing(clock):
    told = []
    stage = Progress("adapt", 2, "steps", told.append)
    clock[0] = 4.9
    stage(1)
    clock[0] = 60.0
    stage(2)  # It is done: whoever called tells the result.
    assert told == []


def test_a_long_stage_says_how_far_it_is_ever_less_often(clock):
    told = []
    stage = Progress("adapt", 100, "steps", told.append)
    for second in range(1, 61):
        clock[0] = float(second)
        stage(second, f"loss {second}")
    assert told[0] == "  adapt     5/100 steps, loss 5, about 2 min left ..."
    assert [int(line.split("/")[0].split()[-1]) for line in told] == [5, 10, 15, 20, 25, 30, 36, 44, 53]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (3540, "59 min"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_have_one_or_two_units(seconds, text):
    assert duration(seconds) == text
