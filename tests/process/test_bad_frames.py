"""A channel that carries nonsense, between real processes: the group breaks at once and says whose
and what; a worker that is sent nonsense ends with a last word."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from _pickle import dumps

import pytest
from bad_frames_ranks import Worker, frame
from drivers import in_thread

import rankwise
from rankwise import GroupBroken, RemoteError, StartupError, WorkerDied, WorkerGroup
from rankwise._messages import ACK, BOOT, CALL, EXIT, FAILED, OK, OK_LENT
from rankwise._spawn import BOOT as START
from rankwise._status import make_status
from rankwise.wire.lending import HEAD

AT_ONCE = 5.0  # seconds: as soon as it is read, on a machine that has other things to do


@pytest.fixture
def group():
    made = WorkerGroup(Worker, 2, logs="off")
    yield made
    made.kill()


# What is written in call 3, the second after the boot: answer 2 of its rank is due.
WRONG = {
    "noise": (b"\xff" * 100, r"a header that is none of ours \(b'\\xff"),
    "text": (b"Traceback (most recent call last):\n", r"none of ours \(b'Traceback \(most recent"),
    "an-earlier-frame": (frame(OK, 1, 2), "frame 1 came where 2 was due"),
    "a-later-frame": (frame(OK, 5, 3), "frame 5 came where 2 was due"),
    "half-a-later-frame": (frame(OK, 5, 3, b"x" * 100)[:50], "frame 5 came where 2 was due"),
    "no-answer": (frame(CALL, 2, 3), "frame 2 is of kind 2, which is no answer"),
    "another-call": (frame(OK, 2, 77), "it has answered call 77, which it was not sent"),
    "lies-nowhere": (frame(OK_LENT, 2, 3, b"?"), "frame 2: the result of call 3 lies nowhere"),
    "lies-outside": (
        frame(OK_LENT, 2, 3, HEAD.pack(1, 0, 0, 0, 1, 1 << 60, 4096, 4096)),
        "the result of call 3 lies nowhere .*no room",
    ),
    # The answer itself is right, and the true one comes after it.
    "twice": (frame(ACK, 2, 3), "frame 2 came where 3 was due"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_bad_frame_breaks_the_group_at_once_and_names_the_rank_and_the_fault(group, wrong):
    data, words = WRONG[wrong]
    group.call("echo", 1)
    began = time.monotonic()
    if wrong == "twice":
        group[1].call("write", data)
        with pytest.raises(GroupBroken):
            in_thread(lambda: group.call("echo", 1)).value(5)
    else:
        with pytest.raises(GroupBroken):
            in_thread(lambda: group[1].call("write", data)).value(5)
    assert time.monotonic() - began < AT_ONCE
    with pytest.raises(GroupBroken, match=words) as caught:
        group.call("echo", 1)
    assert f"rank 1 (pid {group.pids[1]})" in str(caught.value)


def test_a_good_answer_before_the_garbage_arrives(group):
    """Both in one read: what was answered is not thrown away with what cannot be read."""
    group.call("echo", 1)
    good = frame(ACK, 2, 3)
    assert in_thread(lambda: group[1].call("write", good + b"\xff" * 30)).value(5) is None
    with pytest.raises(GroupBroken, match="none of ours"):
        in_thread(lambda: group.call("echo", 1)).value(5)


def test_a_failure_that_cannot_be_read_fails_that_call_only_until_the_true_answer_comes(group):
    group.call("echo", 1)
    with pytest.raises(RemoteError, match=r"rank 1 \(pid \d+\) in write.*cannot be read"):
        group[1].call("write", frame(FAILED, 2, 3, b"?"))
    with pytest.raises(GroupBroken, match="frame 2 came where 3 was due"):
        in_thread(lambda: group.call("echo", 1)).value(5)


def test_garbage_at_the_start_is_a_startup_error_of_that_rank():
    def target():
        frame = sys._getframe()
        while "channel" not in frame.f_locals:
            frame = frame.f_back
        if rankwise.worker_info().rank == 1:
            frame.f_locals["channel"]._sock.sendall(b"garbage in place of an answer" * 3)
            threading.Event().wait()
        return Worker()

    began = time.monotonic()
    with pytest.raises(StartupError, match=r"rank 1: .*none of ours") as caught:
        in_thread(lambda: WorkerGroup(target, 2, logs="off")).value(20)
    assert caught.value.rank == 1
    assert time.monotonic() - began < 15


def test_a_rank_that_is_sent_nonsense_dies_with_a_last_word(group):
    group.call("echo", 1)
    group._engine.pump.sockets.channels[1].sock.send(b"not for you to read, any of this")
    with pytest.raises(GroupBroken) as caught:  # whose first it is, where it is dead already
        in_thread(lambda: [group[1].call("echo", n) for n in range(9)]).value(20)
    error = caught.value if isinstance(caught.value, WorkerDied) else caught.value.first
    assert isinstance(error, WorkerDied)
    assert (error.rank, error.exitcode) == (1, 1)
    assert "rankwise: rank 1 cannot go on: the driver has sent a header that is none" in str(error)
    assert "Traceback" not in error.log_tail


# -- the control channel --------------------------------------------------------------------------


def launchers_end(group):
    """A copy of the launcher's end of the control channel."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    link = group._engine.link
    pid = link.held.process.pid
    for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
        if not os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket"):
            continue
        copy = libc.syscall(438, link.launcher_pidfd, fd, 0)  # pidfd_getfd, from Linux 5.6
        if copy < 0:
            pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        return socket.socket(fileno=copy)  # the launcher has no other
    raise AssertionError("the launcher has no socket")


def test_garbage_from_the_launcher_breaks_the_group_and_says_so(group):
    with launchers_end(group) as sock:
        future = group.submit(lambda worker: threading.Event().wait())
        sock.sendall(b"\xff" * 64)
        with pytest.raises(GroupBroken, match="bad frame on the control channel: length") as caught:
            in_thread(future.result).value(5)
    assert f"its launcher (pid {group._engine.link.held.process.pid})" in str(caught.value)


def test_a_message_of_the_launchers_that_is_none_breaks_the_group_and_says_so(group):
    body = dumps({"status": "ok"}, 5)
    with launchers_end(group) as sock:
        sock.sendall(struct.pack("<Q", len(body)) + body)
        with pytest.raises(GroupBroken, match="it holds a dict"):
            in_thread(lambda: [group.call("echo", n) for n in range(100_000)]).value(20)


def test_garbage_to_the_launcher_ends_the_group_which_says_so(capfd):
    with WorkerGroup(Worker, 2, logs="off") as group:
        future = group.submit(lambda worker: threading.Event().wait())
        group._engine.link._control._sock.sendall(b"\xff" * 64)
        with pytest.raises(GroupBroken, match=r"its launcher \(pid \d+\)"):
            in_thread(future.result).value(5)
    assert "bad frame on the control channel: length" in capfd.readouterr().err


# -- a worker alone -------------------------------------------------------------------------------

TO_A_WORKER = {
    "noise": (b"\xff" * 24, "a header that is none of ours"),
    "out-of-turn": (frame(BOOT, 1, 1), "frame 1 came where 0 was due"),
    "no-boot": (frame(CALL, 0, 1), "a frame of kind 2 where the first call was due"),
    "bad-boot": (frame(BOOT, 0, 1, b"?"), "a first call that is none (UnpicklingError"),
}


@pytest.fixture
def alone():
    """A worker that nobody has booted: its process, and the driver's end of its channel."""
    near, far = socket.socketpair()
    status = make_status(1)
    crash = os.memfd_create("rankwise-crash")
    root = os.path.dirname(os.path.dirname(rankwise.__file__))
    fds = [far.fileno(), status, crash]
    process = subprocess.Popen(
        [sys.executable, "-c", START, root, "0", *map(str, fds), "alone"],
        stderr=subprocess.PIPE,
        pass_fds=fds,
    )
    far.close()
    yield process, near
    process.kill()
    process.wait()
    process.stderr.close()
    near.close()
    os.close(status)
    os.close(crash)


@pytest.mark.parametrize("wrong", TO_A_WORKER)
def test_a_worker_that_cannot_read_what_it_is_sent_says_so_and_ends(alone, wrong):
    process, near = alone
    data, words = TO_A_WORKER[wrong]
    near.sendall(data)
    said = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 1
    assert said.startswith("rankwise: rank 0 cannot go on: the driver has sent ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("cut", [0, 1, 24, 60])
def test_a_worker_whose_driver_ends_in_the_middle_of_a_frame_ends_quietly(alone, cut):
    process, near = alone
    near.sendall(frame(BOOT, 0, 1, b"x" * 100)[:cut])
    near.shutdown(socket.SHUT_WR)
    assert process.communicate(timeout=20)[1] == b""
    assert process.returncode == 0


def test_an_unbooted_worker_that_is_told_to_exit_ends_quietly(alone):
    process, near = alone
    near.sendall(frame(EXIT, 0, 1))
    poll = select.poll()
    poll.register(near, select.POLLHUP)
    assert poll.poll(20_000)
    assert process.wait(20) == 0
