"""Where no thread can be made (a container limits them): it is said, and nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from contract_worker import Worker
from group_restart_ranks import Counting, stuck_but_one

from rankwise import GroupBroken, Restart, WorkerGroup

Make = Callable[..., WorkerGroup]
Refuse = Callable[..., Any]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """`with refuse(kind, ...)`: no thread starts whose name ends so."""

    @contextmanager
    def refuse(*kinds: str) -> Iterator[None]:
        def start_some(thread: threading.Thread) -> None:
            if thread.name.endswith(kinds):
                raise RuntimeError("can't start new thread")
            start(thread)

        start = threading.Thread.start
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start_some)
            yield

    return refuse


def test_a_restart_by_hand_raises_and_the_group_goes_on(make: Make, refuse: Refuse) -> None:
    group = make(Counting, 1, args=([],))
    with refuse("-restart"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="thread"):
                group.restart()
    assert group.call(Counting.count) == [1]
    group.wait_ready(timeout=0)
    group.restart()
    assert group.call(Counting.count) == [1]


@pytest.mark.parametrize("kinds", [("-restart",), ("-restart", "-callbacks")], ids=str)
def test_a_broken_group_that_cannot_be_restarted_stays_broken_and_may_be_tried_again(
    make: Make, refuse: Refuse, kinds: tuple[str, ...]
) -> None:
    group = make(Counting, 2, args=([],), restart=Restart(3, 0.0))
    with refuse(*kinds):
        with pytest.raises(ValueError, match="first"):
            group.options(grace=0.05).call(stuck_but_one)
        while group.healthy:
            threading.Event().wait(0.005)
        with pytest.raises(GroupBroken, match=r"try restart\(\)"):
            group.wait_ready(timeout=20)
    group.restart()
    assert group.call(Counting.count) == [1, 1]


def test_on_failure_hears_of_a_restart_that_cannot_begin(make: Make, refuse: Refuse) -> None:
    heard = threading.Event()
    options = {"restart": Restart(3, 0.0), "on_failure": lambda failure: heard.set()}
    group = make(Counting, 2, args=([],), **options)
    with refuse("-restart"):
        with pytest.raises(ValueError, match="first"):
            group.options(grace=0.05).call(stuck_but_one)
        assert heard.wait(20)


def test_each_callback_that_cannot_be_called_is_refused(make: Make, refuse: Refuse) -> None:
    group = make(Worker, 1, args=("a",), kwargs={"b": 2})
    done = threading.Semaphore(0)
    futures = [group.submit(Worker.get_rank) for _ in range(2)]
    with refuse("-callbacks"):
        for future in futures * 2:
            with pytest.raises(RuntimeError, match="thread"):
                future.add_done_callback(lambda future: done.release())
    for future in futures:
        future.add_done_callback(lambda future: done.release())
        assert done.acquire(timeout=20)
        assert future.result() == [0]
