"""Stages that work at the same time: bounded, in order, and over when they are closed."""

import itertools
import threading
import time

import pytest
import torch

from vla2cli.flow import Ahead, Cores, InTurn

LIMIT_S = 10.0  # for what takes a moment
STAGES = {"ahead": lambda items: Ahead(items, 2, "test-stage"), "in_turn": InTurn}
both = pytest.mark.parametrize("make", STAGES.values(), ids=STAGES)


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind():
    yield
    assert threads() == []


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "test-stage"]


def in_time(function):
    """Call something in a thread, which must come back soon."""
    done = []
    thread = threading.Thread(target=lambda: done.append(function()), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "it hangs"
    return done[0]


def wait_until(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


# items


@both
def test_all_items_come_in_order(make):
    stage = make(iter(range(1, 50)))
    assert list(stage) == list(range(1, 50))
    assert stage.is_over
    assert stage.take() is None
    stage.close()


@both
def test_stage_without_items_is_over_at_once(make):
    stage = make(iter(()))
    assert stage.take() is None
    assert stage.is_over
    stage.close()


@pytest.mark.parametrize("size", [1, 3])
def test_no_more_is_made_ahead_than_there_is_room_for(size):
    made = []
    stage = Ahead((made.append(i) or i for i in itertools.count()), size, "test-stage")
    for taken in range(20):
        # one is held that there is no room for
        wait_until(lambda: len(made) == taken + size + 1)  # noqa: B023 called before the next turn
        time.sleep(0.01)
        assert len(made) == taken + size + 1
        assert stage.take() == taken
    stage.close()


def test_stage_in_turn_makes_an_item_when_it_is_taken():
    made = []
    stage = InTurn(made.append(i) or i for i in range(9))
    assert made == []
    assert stage.take(wait=False) == 0
    assert made == [0]


def test_item_that_is_not_ready_is_not_waited_for():
    gate = threading.Event()
    stage = Ahead((gate.wait(LIMIT_S) and i for i in (1, 2)), 2, "test-stage")
    assert stage.take(wait=False) is None
    assert not stage.is_over
    gate.set()
    assert [stage.take(), stage.take(), stage.take()] == [1, 2, None]
    assert stage.is_over
    stage.close()


# errors


def failing(error):
    yield 1
    yield 2
    raise error


@both
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["value", "exit"])
def test_error_comes_to_the_taker_behind_the_items_before_it(make, error):
    stage = make(failing(error))
    assert [stage.take(), stage.take()] == [1, 2]
    with pytest.raises(type(error)) as raised:
        stage.take()
    assert raised.value is error
    assert stage.is_over
    assert stage.take() is None
    stage.close()


# closing


class Source:
    """Items without end that tells when it is closed, and in which thread."""

    def __init__(self):
        self.closed_in = []

    def __iter__(self):
        try:
            yield from itertools.count(1)
        finally:
            self.closed_in.append(threading.current_thread().name)


@both
def test_closed_stage_closes_its_items_and_gives_no_more(make):
    source = Source()
    stage = make(iter(source))
    assert stage.take() == 1
    in_time(stage.close)
    assert len(source.closed_in) == 1
    assert stage.is_over
    assert stage.take() is None
    assert list(stage) == []
    in_time(stage.close)


def test_items_are_closed_in_the_thread_that_made_them():
    source = Source()
    stage = Ahead(iter(source), 1, "test-stage")
    stage.take()
    stage.close()
    assert source.closed_in == ["test-stage"]


def test_stage_that_is_blocked_by_a_full_queue_can_be_closed():
    made = []
    stage = Ahead((made.append(i) or i for i in itertools.count()), 1, "test-stage")
    wait_until(lambda: len(made) == 2)
    in_time(stage.close)
    assert len(made) == 2


def test_taker_that_waits_is_let_go_when_the_stage_is_closed():
    gate = threading.Event()
    stage = Ahead((gate.wait(LIMIT_S) and i for i in (1,)), 1, "test-stage")
    found = []
    taker = threading.Thread(target=lambda: found.append(stage.take()))
    taker.start()
    time.sleep(0.05)
    closer = threading.Thread(target=stage.close)
    closer.start()
    taker.join(LIMIT_S)
    assert found == [None]
    gate.set()  # the item in hand is finished
    closer.join(LIMIT_S)
    assert not closer.is_alive()


@both
def test_stage_of_a_stage_is_closed_from_the_last_to_the_first(make):
    source = Source()
    first = make(iter(source))
    second = make(2 * i for i in first)
    assert [second.take(), second.take()] == [2, 4]
    in_time(second.close)
    in_time(first.close)
    assert len(source.closed_in) == 1


def test_error_that_nobody_takes_holds_nothing_up():
    stage = Ahead(failing(ValueError("no")), 1, "test-stage")
    assert stage.take() == 1
    in_time(stage.close)


# cores


@pytest.fixture
def four_threads():
    """Torch with four threads, in whichever thread it is asked."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def num_threads_in(cores):
    """What a new thread finds that uses the cores."""
    found = []

    def work():
        with cores.use():
            found.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT_S)
    return found[0]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("num_others", "share"), [(0, 4), (1, 2), (2, 1), (3, 1), (9, 1)])
def test_cores_are_divided_between_this_thread_and_other_processes(num_others, share):
    assert num_threads_in(Cores(lambda: num_others, is_shared=True)) == share


@pytest.mark.usefixtures("four_threads")
def test_threads_that_compute_at_the_same_time_have_a_share_each():
    cores = Cores(lambda: 0, is_shared=True)
    is_inside, may_go = threading.Event(), threading.Event()

    def work():
        with cores.use():
            is_inside.set()
            may_go.wait(LIMIT_S)

    other = threading.Thread(target=work)
    other.start()
    assert is_inside.wait(LIMIT_S)
    assert num_threads_in(cores) == 2
    may_go.set()
    other.join(LIMIT_S)
    assert num_threads_in(cores) == 4


@pytest.mark.usefixtures("four_threads")
def test_one_run_leaves_all_cores_to_the_next():
    for _ in range(3):
        assert num_threads_in(Cores(lambda: 1, is_shared=True)) == 2
    assert num_threads_in(Cores(lambda: 0, is_shared=True)) == 4


@pytest.mark.usefixtures("four_threads")
def test_cores_come_back_from_what_fails():
    cores = Cores(lambda: 0, is_shared=True)
    with pytest.raises(ValueError, match="no"), cores.use():
        raise ValueError("no")
    assert num_threads_in(cores) == 4


@pytest.mark.usefixtures("four_threads")
def test_cores_that_are_not_shared_are_left_alone():
    assert num_threads_in(Cores(lambda: 3, is_shared=False)) == 4
