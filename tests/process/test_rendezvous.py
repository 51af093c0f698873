"""Eight groups that start at once, again and again, while another process takes every free port.

    the grabber   binds each ephemeral port in turn, without SO_REUSEADDR; keeps thousands of them,
                  lets the oldest go, takes what others let go
    a round       eight groups start at once, each meets at a port of its own, each reduces

A rendezvous that chooses a port, lets go of it and has rank 0 bind it later loses it to the grabber
(or to another group) sooner or later. Neither rankwise's nor torch's own, with the MASTER_PORT that
a group reserves, ever does. A port that is let go of lasts for a second here, so a loss shows
within a few rounds.

There are fifty rounds of each kind. A start takes ranks a hundred times as long as to meet, so they
meet several times before they start again at another port: each time anew, at a port that was let
go of a moment ago but for its reservation. RANKWISE_RENDEZVOUS_ROUNDS says how many rounds there
are, and then each has a start of its own.

A start is a restart: it reserves a port as the first one does, and imports nothing.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from rendezvous_ranks import LIMIT, Meeting, Reduction

from rankwise import WorkerGroup, worker_info

GROUPS = 8
ASKED = os.environ.get("RANKWISE_RENDEZVOUS_ROUNDS")
ROUNDS = int(ASKED or 50)

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

# It keeps half of the ephemeral ports at most: the other half is for whoever starts a group here.
# The pauses leave the two sides a processor each where there are two. End of file on stdin ends it.
GRABBER = """
import collections, resource, select, socket, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
    low, high = map(int, file.read().split())
most = min((high - low) // 2, hard - 100)
held = collections.deque()
taken = refused = 0
while True:
    for port in range(low, high + 1):
        if not port % 500 and select.select([sys.stdin], [], [], 0.001)[0]:
            print(taken, refused)
            sys.exit()
        taker = socket.socket()
        try:
            taker.bind(("127.0.0.1", port))
        except OSError:
            taker.close()
            refused += 1
            continue
        taken += 1
        held.append(taker)
        if len(held) > most:
            held.popleft().close()
"""


@pytest.fixture
def grabber() -> Iterator[None]:
    """A process that takes free ports; it has been seen to take one that was let go."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GRABBER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert _is_taken(_let_go())
        yield
        began = time.monotonic()
        assert _is_taken(_let_go())  # and it still does
        waited = time.monotonic() - began
        output, _ = process.communicate(timeout=30)
        taken, refused = map(int, output.split())
        print(f"the grabber bound {taken} ports, the last after {waited * 1000:.0f} ms")
        assert process.returncode == 0
        assert taken > 1000
        assert refused > 0
    finally:
        process.kill()
        process.communicate()


def _let_go() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def _is_taken(port: int) -> bool:
    """Whether somebody takes `port` within half a minute. It is tried, and let go, meanwhile."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                assert error.errno == errno.EADDRINUSE
                return True
        time.sleep(0.001)  # not to keep it from the grabber by trying
    return False


# -- eight groups at once ----------------------------------------------------------------------


@contextmanager
def _eight(target: Callable[..., object], **options: Any) -> Iterator[list[WorkerGroup]]:
    """Eight groups of two ranks each, which know the number of their group."""

    def make(index: int) -> WorkerGroup:
        return WorkerGroup(target, 2, args=(index,), start_method="forkserver", **options)

    with ThreadPoolExecutor(GROUPS) as pool, ExitStack() as stack:
        yield [stack.enter_context(group) for group in pool.map(make, range(GROUPS))]


@pytest.fixture
def meetings() -> Iterator[list[WorkerGroup]]:
    with _eight(Meeting) as groups:
        yield groups


@pytest.fixture
def reductions() -> Iterator[list[WorkerGroup]]:
    # torch asks for the name of each loopback address that it connects to. No name server is asked
    # for it here: where none answers, that takes five seconds.
    silent = {"RES_OPTIONS": "attempts:0"}
    with _eight(Reduction, preload=("torch.distributed",), env=silent, logs="off") as groups:
        yield groups


def _rounds(groups: list[WorkerGroup], *kinds: str, every: int) -> None:
    """All rounds of rendezvous of these kinds, which are methods of the ranks: in all groups at the
    same moment. Before every so many rounds all of them start again."""
    barrier = threading.Barrier(GROUPS)
    every = 1 if ASKED else every

    def one(group: WorkerGroup, number: int) -> list[set[tuple[float, int]]]:
        barrier.wait(LIMIT)
        if number % every == 0:
            group.restart()
        return [set(group.submit(kind).result(LIMIT)) for kind in kinds]

    ports: set[int] = set()
    seconds = []
    starts = len(range(0, ROUNDS, every))
    with ThreadPoolExecutor(GROUPS) as pool:
        for number in range(ROUNDS):
            began = time.monotonic()
            answers = list(pool.map(one, groups, [number] * GROUPS))
            seconds.append(time.monotonic() - began)
            for met in zip(*answers, strict=True):
                # Both ranks of group i have met each other, and nobody of another group.
                assert [{value for value, _ in answer} for answer in met] == [
                    {index} for index in range(GROUPS)
                ]
                told = {port for answer in met for _, port in answer}
                assert len(told) == GROUPS
                ports |= told
    print(
        f"{' and '.join(kinds)}: {ROUNDS} rounds of {GROUPS} groups, {starts} starts, "
        f"{len(ports)} ports; a round took {min(seconds):.2f} to {max(seconds):.2f} s, "
        f"{sum(seconds):.0f} s in all"
    )


# -- the promise ------------------------------------------------------------------------------


@pytest.mark.limit(LIMIT * (ROUNDS // 10 + 1))
def test_a_reserved_port_is_never_lost(meetings, grabber):
    _rounds(meetings, "meet", every=5)


@needs_torch
@pytest.mark.limit(LIMIT * (ROUNDS // 10 + 1))
def test_eight_groups_at_once_never_collide(reductions, grabber):
    _rounds(reductions, "plain", "ours", every=10)


def test_a_reserved_port_is_refused_to_everybody_else():
    with WorkerGroup(Meeting, 2, args=(0,), start_method="forkserver") as group:
        port = group[0].call(lambda worker: worker_info().master_port)
        for address in ("127.0.0.1", ""):
            with socket.socket() as other, pytest.raises(OSError) as refused:
                other.bind((address, port))
            assert refused.value.errno == errno.EADDRINUSE
        assert {value for value, _ in group.call(Meeting.meet)} == {0}
