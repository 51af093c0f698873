"""The real launcher process, driven by a harness: what its ranks write."""

from __future__ import annotations

import select
import time

from launcher_harness import SECONDS, Start

from rankwise import _procfs
from rankwise._messages import Shown


def test_lines_carry_a_prefix_and_partial_ones_wait_for_their_end(start: Start) -> None:
    group = start(2)
    group.ask("os.write(1, b'one\\ntwo'); os.write(2, b'err\\r\\n')", 0)
    group.ask("os.write(1, b'half')", 1)
    zero = b"(g rank=0 pid=%d) " % group.pids[0]
    one = b"(g rank=1 pid=%d) " % group.pids[1]
    group.until(lambda: b"one" in group.shown[1] and b"err" in group.shown[2])
    assert bytes(group.shown[1]) == zero + b"one\n"
    assert bytes(group.shown[2]) == zero + b"err\n"
    group.tell("os.write(1, b' -- and dead'); os._exit(1)", 0)
    assert group.exited(0).log_tail == "one\ntwoerr\r\n -- and dead"
    assert group.finish() == []
    lines = group.shown[1].splitlines(keepends=True)
    assert lines == [zero + b"one\n", zero + b"two -- and dead\n", one + b"half\n"]


def test_color_marks_the_prefix_only(start: Start) -> None:
    group = start(1, color=True)
    group.ask("os.write(1, b'text\\n')")
    assert group.finish() == []
    pid = group.pids[0]
    assert group.shown[1] == b"\x1b[36m(g rank=0 pid=%d)\x1b[0m text\n" % pid


def test_inherit_passes_bytes_through_and_off_shows_none(start: Start) -> None:
    written = b"\r 10%\r\nhalf"
    for mode, shown in (("inherit", written), ("off", b"")):
        group = start(1, mode=mode)
        group.ask(f"os.write(1, {written!r})")
        assert group.finish() == []
        assert bytes(group.shown[1]) == shown
        assert group.ended[0].log_tail == written.decode()


def test_a_line_of_10_mb_arrives_whole_and_memory_of_the_tail_is_bounded(start: Start) -> None:
    group = start()
    group.tell("out = b'x' * (10 << 20) + b'end\\n'\nwhile out: out = out[os.write(1, out):]")
    group.until(lambda: group.shown[1].endswith(b"end\n"))
    line = bytes(group.shown[1])
    assert line.removeprefix(b"(g rank=0 pid=%d) " % group.pids[0]) == b"x" * (10 << 20) + b"end\n"
    assert group.answer() is None
    assert group.finish() == []
    assert len(group.ended[0].log_tail) == 1 << 16


def test_a_flood_that_nobody_shows_is_dropped_counted_and_told(start: Start) -> None:
    group = start(2)
    group.acknowledge = False
    group.ask("result = 1", 1)
    before = _procfs.peak_rss(group.process.pid)
    lines = 1_000_000
    group.tell(
        "out = b''.join(b'%07d' % i + b'x' * 92 + b'\\n' for i in range(1000))\n"
        f"for _ in range({lines} // 1000):\n"
        "    left = out\n"
        "    while left: left = left[os.write(1, left):]\n"
    )
    while not select.select([group.calls[0]], [], [], 0)[0]:
        group.hear(0.05)
    group.answer()  # the rank was never made to wait for us
    while len(group.shown[1]) <= 15 << 20:
        assert group.hear()
    while group.hear(2):
        pass
    shown = group.shown[1].count(b"\n")
    assert len(group.shown[1]) <= 16 << 20
    assert len(group.shown[1]) > 15 << 20
    assert group.shown[1].endswith(b"\n")
    assert _procfs.peak_rss(group.process.pid) - before < 64 << 20
    assert group.shown[2] == b""
    group.acknowledge = True
    group.send(Shown(len(group.shown[1])))
    group.until(lambda: b"dropped" in group.shown[2])
    told = b"(g) %d lines were dropped: the reader of this output is too slow\n" % (lines - shown)
    assert bytes(group.shown[2]) == told
    group.ask("print('again', flush=True)", 1)
    group.until(lambda: b"again" in group.shown[1])
    assert group.finish() == []
    assert bytes(group.shown[2]) == told


def test_what_was_dropped_is_told_at_the_end_at_the_latest(start: Start) -> None:
    group = start(1)
    group.acknowledge = False
    group.ask("for _ in range(20): os.write(1, b'y' * (1 << 20) + b'\\n')")
    assert group.finish() == []
    dropped = 20 - group.shown[1].count(b"\n")
    assert 1 < dropped < 20
    assert group.shown[2].startswith(b"(g) %d lines were dropped" % dropped)


def test_a_death_overtakes_output_that_the_driver_has_not_read(start: Start) -> None:
    group = start(2)
    group.ask("for _ in range(8): os.write(1, b'z' * (1 << 20) + b'\\n')")
    group.tell("os._exit(7)", 1)
    deadline = time.monotonic() + SECONDS
    while _procfs.stat(group.pids[1]):  # until it is reaped, which no descriptor tells
        assert time.monotonic() < deadline
    # Now 8 MB are queued ahead of the report.
    assert group.exited(1).exitcode == 7
    assert group.shown[1].count(b"\n") < 8
    assert group.finish() == []
    assert group.shown[1].count(b"\n") == 8


def test_a_descendant_that_holds_the_pipe_does_not_delay_the_report(start: Start) -> None:
    group = start(1)
    # In a session of its own and with another RANK: it is taken for a living rank's and is spared.
    group.ask(
        "import subprocess\n"
        "env = dict(os.environ, RANK='1')\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True, env=env)\n"
        "os.write(1, b'half a line')"
    )
    group.tell("os._exit(0)")
    assert group.exited().log_tail == "half a line"
    group.until(lambda: group.shown[1].endswith(b"half a line\n"))
    assert group.finish() == []
