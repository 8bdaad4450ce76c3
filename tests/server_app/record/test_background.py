"""Jobs beside the clients are done in order, not before they may, and a fault in one reaches the caller."""

import threading
from functools import partial

import pytest

from fedmmkt.server_app.record.background import Background


def failing():
    raise OSError(28, "disk full")


def test_jobs_are_done_in_order_by_another_thread_once_they_may_begin():
    done, threads = [], set()
    with Background() as background:
        for number in range(3):
            background.add(lambda number=number: (done.append(number), threads.add(threading.get_ident())))
        background.wait(begin=False)
        assert done == []

        background.begin()
        background.wait(begin=False)

        assert done == [0, 1, 2]
        assert len(threads - {threading.get_ident()}) == 1


def test_the_thread_ends_with_the_last_job_that_may_begin_and_another_one_goes_on():
    threads = []
    with Background() as background:
        for _ in range(2):
            background.add(lambda: threads.append(threading.current_thread()))
            background.wait()
            threads[-1].join(10)
            assert not threads[-1].is_alive()

    assert len(threads) == 2


def test_jobs_that_never_began_are_done_at_the_end():
    done = []
    with Background() as background:
        background.add(partial(done.append, 1))
    assert done == [1]


def test_the_first_fault_is_raised_in_the_callers_thread_and_no_later_job_is_done():
    done, background = [], Background()
    background.add(failing)
    background.add(partial(done.append, 1))
    for told in (background.wait, background.check, background.wait):
        with pytest.raises(OSError, match="disk full"):
            told()
    assert done == []


def test_after_a_fault_of_the_caller_what_is_left_is_done_and_that_fault_counts(caplog):
    done = []

    def caller():
        with Background() as background:
            background.add(partial(done.append, 1))
            background.add(failing)
            raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        caller()

    assert done == [1]
    assert "beside its clients failed as well: [Errno 28] disk full" in caplog.text
