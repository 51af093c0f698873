"""The driver's printer, writing to pipes, terminals, files and objects that stand in for them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rankwise.logs.show import Printer, use_color

SECONDS = 20.0  # what no test should need


class Acknowledged:
    """Counts what the printer says is shown."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, nbytes: int) -> None:
        self.nbytes += nbytes


@contextlib.contextmanager
def descriptor_1(fd: int) -> Iterator[None]:
    """`fd` as descriptor 1, and a sys.stdout that says so, as in a plain script."""
    saved, stdout = os.dup(1), sys.stdout
    os.dup2(fd, 1)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    try:
        yield
    finally:
        sys.stdout = stdout
        os.dup2(saved, 1)
        os.close(saved)


@pytest.fixture
def printer() -> Iterator[tuple[Printer, Acknowledged]]:
    shown = Acknowledged()
    printer = Printer("g", shown)
    yield printer, shown
    printer.close()


Shown = tuple[Printer, Acknowledged]


def reader(fd: int, want: int, first: Callable[[], None] = lambda: None) -> Callable[[], bytes]:
    """Read `want` bytes of `fd` on a thread; returns what waits for them."""
    chunks: list[bytes] = []

    def read() -> None:
        first()
        while sum(map(len, chunks)) < want:
            if not select.select([fd], [], [], SECONDS)[0]:
                return
            chunks.append(os.read(fd, 1 << 16))

    thread = threading.Thread(target=read)
    thread.start()

    def result() -> bytes:
        thread.join()
        return b"".join(chunks)

    return result


@pytest.mark.parametrize("nonblocking", [False, True], ids=["blocking", "nonblocking"])
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_everything_arrives_in_order_and_o_nonblock_stays_as_it_was(
    printer: Shown, kind: str, nonblocking: bool
) -> None:
    if kind == "pipe":
        read_end, write_end = os.pipe()
    else:
        read_end, write_end = pty.openpty()
        attributes = termios.tcgetattr(write_end)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(write_end, termios.TCSANOW, attributes)
    os.set_blocking(write_end, not nonblocking)
    block = b"".join(b"line %06d\n" % i for i in range(6_000))
    with descriptor_1(write_end):
        result = reader(read_end, 5 * len(block))
        for _ in range(5):
            printer[0].put(1, block)
        assert printer[0].drain(SECONDS)
    assert result() == block * 5
    printer[0].close()  # it acknowledges behind the drain
    assert printer[1].nbytes == 5 * len(block)
    assert os.get_blocking(write_end) is not nonblocking
    os.close(read_end)
    os.close(write_end)


def test_a_kernel_that_cannot_be_asked_not_to_wait(
    printer: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "pwritev", refuse)
    read_end, write_end = os.pipe()
    data = bytes(range(256)) * 2_000
    with descriptor_1(write_end):
        result = reader(read_end, len(data))
        printer[0].put(1, data)
        assert printer[0].drain(SECONDS)
    assert result() == data
    # and close() is heard while nobody reads
    with descriptor_1(write_end):
        printer[0].put(1, data)
        assert not printer[0].drain(0)
        printer[0].close()
        assert not printer[0]._thread._thread.is_alive()
    os.close(read_end)
    os.close(write_end)


def test_put_never_waits_for_a_reader_that_sleeps_and_close_ends_the_thread(
    printer: Shown,
) -> None:
    read_end, write_end = os.pipe()
    with descriptor_1(write_end):
        for _ in range(100):
            printer[0].put(1, b"x" * 65_536)
        assert not printer[0].drain(0.01)
        assert printer[1].nbytes < 100 * 65_536
        printer[0].close()
    assert not printer[0]._thread._thread.is_alive()
    printer[0].put(1, b"too late")
    printer[0].close()
    os.close(read_end)
    os.close(write_end)


def test_close_alone_writes_what_can_be_written_without_waiting() -> None:
    read_end, write_end = os.pipe()
    with descriptor_1(write_end):
        printer = Printer("g", Acknowledged())
        printer.put(1, b"last words\n")
        printer.close()
    os.close(write_end)
    assert os.read(read_end, 100) == b"last words\n"
    os.close(read_end)


def test_a_broken_pipe_is_thrown_away_and_acknowledged(printer: Shown) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with descriptor_1(write_end):
        for _ in range(10):
            printer[0].put(1, b"x" * 1000)
        assert printer[0].drain(SECONDS)
    printer[0].close()
    assert printer[1].nbytes == 10_000
    os.close(write_end)


def test_a_regular_file_gets_everything(printer: Shown, tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file, descriptor_1(file.fileno()):
        printer[0].put(1, b"one\n" * 100_000)
        printer[0].put(1, b"two\n")
        assert printer[0].drain(SECONDS)
    assert (tmp_path / "log").read_bytes() == b"one\n" * 100_000 + b"two\n"


def test_a_stdout_that_is_not_descriptor_1_is_written_to(
    printer: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = io.StringIO(), io.StringIO()  # their fileno() raises, as a notebook's does
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    printer[0].put(1, "naï".encode()[:-1])
    printer[0].put(2, b"to the other\n")
    printer[0].put(1, "naï".encode()[-1:] + b"ve \xff\n")
    assert printer[0].drain(SECONDS)
    assert out.getvalue() == "naïve \ufffd\n"
    assert err.getvalue() == "to the other\n"


def test_a_stdout_that_cannot_encode_a_character_gets_the_rest(
    printer: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    printer[0].put(1, "naïve\n".encode())
    assert printer[0].drain(SECONDS)
    assert out.buffer.getvalue() == b"na\\xefve\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("broken", ["closed", "none", "raises"])
def test_a_stdout_that_is_broken_does_not_stop_what_follows(
    printer: Shown, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    out = io.StringIO()
    with monkeypatch.context() as patch:
        if broken == "closed":
            out.close()
            patch.setattr(sys, "stdout", out)
        elif broken == "none":
            patch.setattr(sys, "stdout", None)
        else:
            patch.setattr(sys, "stdout", object())
        printer[0].put(1, b"lost\n")
        assert printer[0].drain(SECONDS)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    printer[0].put(1, b"shown\n")
    assert printer[0].drain(SECONDS)
    assert out.getvalue() == "shown\n"


def test_in_a_forked_child_close_touches_nothing(printer: Shown) -> None:
    with printer[0]._order:  # another thread of the parent may hold it at that moment
        pid = os.fork()
        if not pid:
            printer[0].close()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert printer[0]._thread._thread.is_alive()


@pytest.mark.parametrize("close", ["close", "leave"])
def test_a_stopped_terminal_keeps_no_interpreter_alive(close: str) -> None:
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
from rankwise.logs.show import Printer
printer = Printer("g", lambda nbytes: None)
for _ in range(100):
    printer.put(1, b"x" * 4095 + b"\\n")
assert not printer.drain(0.2)
if {close!r} == "close":
    printer.close()
"""
    master, terminal = pty.openpty()
    termios.tcflow(terminal, termios.TCOOFF)  # what ^S does
    try:
        child = subprocess.run(
            [sys.executable, "-X", "dev", "-c", code],
            stdout=terminal,
            stderr=subprocess.PIPE,
            timeout=SECONDS,
        )
    finally:
        termios.tcflow(terminal, termios.TCOON)
        os.close(terminal)
        os.close(master)
    assert (child.returncode, child.stderr) == (0, b"")


def test_the_thread_is_named_for_the_group_and_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    printer = Printer("shards", Acknowledged())
    assert printer._thread.name == "rankwise-shards-logs"
    assert printer._thread._thread.daemon
    printer.close()
    assert os.listdir("/proc/self/fd") == before


def test_color_is_for_terminals_and_no_color_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = pty.openpty()
    monkeypatch.delenv("NO_COLOR", raising=False)
    with descriptor_1(terminal):
        assert use_color()
        monkeypatch.setenv("NO_COLOR", "")
        assert use_color()
        monkeypatch.setenv("NO_COLOR", "1")
        assert not use_color()
    monkeypatch.delenv("NO_COLOR")
    read_end, write_end = os.pipe()
    with descriptor_1(write_end):
        assert not use_color()
    for fd in (master, terminal, read_end, write_end):
        os.close(fd)
    assert fcntl.fcntl(1, fcntl.F_GETFD) == 0  # descriptor 1 is what it was
