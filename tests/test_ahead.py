import sqlite3
import threading
from contextlib import closing

import pytest

from metarun.engine.ahead import Ahead


def test_the_tasks_of_the_next_step_are_drawn_by_another_thread_once_and_none_after_the_last():
    drawn = []

    def draw(step):
        drawn.append((step, threading.current_thread() is threading.main_thread()))
        return step

    with closing(Ahead(draw, 5)) as tasks:
        # A step may be taken again, or left out, as after a checkpoint.
        assert [tasks(step, step > 1) for step in (1, 2, 3, 3, 4)] == [1, 2, 3, 3, 4]
    assert sorted(drawn) == [(1, True), (2, True), (3, False), (3, True), (4, False), (4, False)]


def test_data_that_only_the_thread_can_read_that_opened_them_are_read_by_it():
    with closing(sqlite3.connect(":memory:")) as data, closing(Ahead(lambda step: read(data, step), 4)) as tasks:
        assert [tasks(step, True) for step in range(4)] == [0, 1, 2, 3]


def read(data, step):
    return data.execute("select ?", (step,)).fetchone()[0]


def test_an_error_in_drawing_is_that_of_its_step():
    def draw(step):
        return 1 // (2 - step)

    with closing(Ahead(draw, 4)) as tasks:
        assert tasks(0, True) == 0
        assert tasks(1, True) == 1
        with pytest.raises(ZeroDivisionError):
            tasks(2, True)
