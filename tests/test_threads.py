"""Files that are read ahead and written behind, in threads."""

import threading

import pytest

from scclip_fast.threads import Behind, ahead


def test_items_are_read_ahead_and_come_in_order():
    read, most = [], []

    def double(item):
        read.append(item)
        if item == 3:
            raise OSError("damaged")
        return 2 * item

    for item, future in ahead(double, range(6), count=2):
        if item == 3:
            with pytest.raises(OSError, match="damaged"):
                future.result()
        else:
            assert future.result() == 2 * item
        most.append(len(read) - item)
    assert sorted(read) == list(range(6)) and max(most) <= 3


def test_a_reader_that_is_left_early_stops():
    started = []
    for item, _ in ahead(started.append, range(1000), count=2):
        if item == 3:
            break
    assert len(started) <= 7


def test_calls_run_in_other_threads_and_are_waited_for():
    threads = []
    with Behind(2) as behind:
        for _ in range(5):
            behind.call(lambda: threads.append(threading.current_thread()))
    assert len(threads) == 5 and threading.main_thread() not in threads


@pytest.mark.parametrize("later", [0, 5])
def test_what_a_call_raises_is_raised(later):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind(2) as behind:
        behind.call(fail)
        for _ in range(later):
            behind.call(int)


def test_an_error_of_the_caller_comes_first():
    with pytest.raises(KeyError), Behind(2) as behind:
        behind.call(int, "no number")
        raise KeyError
