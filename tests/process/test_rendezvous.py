"""Eight groups that start at once, again and again, while another process takes every free port.

    the grabber   binds each ephemeral port in turn, without SO_REUSEADDR; keeps thousands of them,
                  lets the oldest go, takes what others let go
    a round       eight groups start at once, each meets at a port of its own, each reduces

A rendezvous that chooses a port, lets go of it and has rank 0 bind it later loses it to the grabber
(or to another group) sooner or later. Neither rankwise's nor torch's own, with the MASTER_PORT that
a group reserves, ever does. Who is let go of lasts for a second here, so a loss shows within a few
rounds; RANKWISE_RENDEZVOUS_ROUNDS says how many there are, and with torch a tenth of them.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from rendezvous_ranks import LIMIT, Meeting, Reduction

from rankwise import WorkerGroup, worker_info

GROUPS = 8
ROUNDS = int(os.environ.get("RANKWISE_RENDEZVOUS_ROUNDS", "15"))
ROUNDS_WITH_TORCH = max(1, ROUNDS // 10)

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


def _rounds(count: int, start: object, label: str) -> None:
    """`count` rounds: `start(index)` makes the group `index`, all eight at the same moment."""
    barrier = threading.Barrier(GROUPS)

    def one(index: int) -> set[tuple[float, int]]:
        barrier.wait(LIMIT)
        with start(index) as group:
            met = group.submit("meet").result(LIMIT)
        return set(met)

    seconds = []
    with ThreadPoolExecutor(GROUPS) as pool:
        for _ in range(count):
            began = time.monotonic()
            answers = list(pool.map(one, range(GROUPS)))
            seconds.append(time.monotonic() - began)
            # Both ranks of group i have met each other, and nobody of another group.
            assert [{value for value, _ in answer} for answer in answers] == [
                {index} for index in range(GROUPS)
            ]
            assert len({port for answer in answers for _, port in answer}) == GROUPS
    print(
        f"{label}: {count} rounds of {GROUPS} groups; a round took {min(seconds):.2f} to "
        f"{max(seconds):.2f} s, {sum(seconds):.0f} s in all"
    )


# -- the promise ------------------------------------------------------------------------------


@pytest.mark.limit(LIMIT * (ROUNDS // 10 + 1))
def test_a_reserved_port_is_never_lost(grabber):
    def start(index: int) -> WorkerGroup[Meeting]:
        return WorkerGroup(Meeting, 2, args=(index,), start_method="forkserver")

    _rounds(ROUNDS, start, "MASTER_PORT")


@needs_torch
@pytest.mark.limit(LIMIT * (ROUNDS_WITH_TORCH + 1))
@pytest.mark.parametrize("how", ["ours", "plain"])
def test_eight_groups_at_once_never_collide(how, grabber):
    def start(index: int) -> WorkerGroup[Reduction]:
        return WorkerGroup(
            Reduction,
            2,
            args=(index, how == "ours"),
            start_method="forkserver",
            preload=("torch",),
            start_timeout=LIMIT,
        )

    _rounds(ROUNDS_WITH_TORCH, start, how)


def test_a_reserved_port_is_refused_to_everybody_else():
    with WorkerGroup(Meeting, 2, args=(0,), start_method="forkserver") as group:
        port = group[0].call(lambda worker: worker_info().master_port)
        for address in ("127.0.0.1", ""):
            with socket.socket() as other, pytest.raises(OSError) as refused:
                other.bind((address, port))
            assert refused.value.errno == errno.EADDRINUSE
        assert {value for value, _ in group.call(Meeting.meet)} == {0}
