"""Guarantee 11: what workers print is shown, kept and never waited for."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from drivers import PRELUDE, SECONDS, Script, in_thread, readable, until
from g11_output_ranks import Worker

from rankwise import StartupError, WorkerDied, WorkerGroup

WORKER = """
class Worker:
    def echo(self, value): return value
    def print(self, text, **options): print(text, **options)
    def write(self, fd, text): os.write(fd, text.encode())
    def printf(self, text):
        libc = ctypes.CDLL(None)
        libc.printf(text.encode())
        libc.fflush(None)
    def child(self, text):
        import subprocess
        subprocess.run([sys.executable, "-c", f"print({text!r})"])
    def many(self, megabytes, fd=1):
        line = b"x" * 99 + b"\\n"
        block = line * 1000
        for _ in range(megabytes * 10): os.write(fd, block)
    def crash(self, text):
        sys.stderr.write(text)
        os.abort()
    def log(self):
        import logging
        logging.warning("a warning")
    def traceback(self):
        import traceback
        try: 1 / 0
        except ZeroDivisionError: traceback.print_exc()
"""


def run(body, options="", ranks=2, env=None, **more):
    """Standard output and standard error of a driver that runs `body` with a group."""
    code = (
        PRELUDE + WORKER + f"with WorkerGroup(Worker, {ranks}, {options}) as group:\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        stdin=subprocess.DEVNULL, env=os.environ | (env or {}), **more,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.parametrize("how", ["print", "write", "printf", "child"])
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_every_way_of_printing_is_shown_with_the_rank(how, start_method):
    call = f"group[1].call({how!r}, {'1, ' if how == 'write' else ''}'some words')"
    if how == "write":
        call = "group[1].call('write', 1, 'some words\\n')"
    out, err = run(call, f"start_method={start_method!r}")
    assert err == ""
    assert len(out.splitlines()) == 1
    assert out.endswith("some words\n")
    assert re.match(r".*workers.*1.*some words$", out)


def test_each_stream_goes_to_its_own():
    out, err = run("group.call('write', 1, 'to out\\n')\ngroup.call('write', 2, 'to err\\n')")
    assert out.count("to out\n") == 2 and "to err" not in out
    assert err.count("to err\n") == 2 and "to out" not in err


def test_a_print_is_shown_before_the_with_block_ends_and_in_order():
    out, _ = run("for number in range(200): group[0].call('print', number)")
    numbers = [int(line.split()[-1]) for line in out.splitlines()]
    assert numbers == list(range(200))


def test_a_partial_line_is_shown_at_the_end():
    out, _ = run("group[0].call('write', 1, 'no newline')")
    assert out.rstrip("\n").endswith("no newline")


def test_a_line_of_ten_megabytes_is_shown_whole():
    out, _ = run(
        "group[0].call(lambda worker: sys.stdout.write('a' * 10_000_000 + 'END\\n') and None)"
    )
    assert out.count("a") >= 10_000_000
    assert out.rstrip().endswith("END")


def test_carriage_returns_and_utf8_survive():
    out, _ = run("group[0].call('print', 'Grüße 漢字 \\N{SNOWMAN}')")
    assert out.rstrip("\n").endswith("Grüße 漢字 \N{SNOWMAN}")


def test_output_at_import_and_in_the_constructor_is_shown(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import os\nprint('imported')\nos.write(2, b'low level\\n')\n"
        "class Noisy:\n    def __init__(self): print('constructed')\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from noisy import Noisy\nfrom rankwise import WorkerGroup\nWorkerGroup(Noisy, 2).close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("imported") == 3  # the driver's own, and two ranks'
    assert done.stdout.count("constructed") == 2
    assert done.stderr.count("low level") == 3


def test_the_last_words_of_a_crash_are_in_the_error_and_on_the_screen():
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
try: group[1].call("crash", "first\\nlast words without an end")
except WorkerDied as error: say(tail=error.log_tail, text=str(error))
group.close()
"""
    with Script(code) as script:
        said = script.line()
        assert said["tail"].endswith("last words without an end")
        assert "last words" in said["text"]
        assert script.end() == 0
        assert "first" in script.errors()
        assert "last words without an end" in script.errors()


def test_a_failed_starts_last_words_are_in_the_error():
    class Fails:
        def __init__(self):
            print("about to fail")
            os._exit(7)

    with pytest.raises(StartupError) as caught:
        WorkerGroup(Fails, 1)
    assert "about to fail" in caught.value.log_tail


def test_the_last_64_kilobytes_are_kept_when_nothing_is_shown():
    class Talks:
        def talk(self):
            for number in range(20_000):
                print(f"line {number}")
            sys.stdout.flush()
            os._exit(1)

    with WorkerGroup(Talks, 1, logs="off") as group:
        with pytest.raises(WorkerDied) as caught:
            group[0].call("talk")
    tail = caught.value.log_tail
    assert tail.rstrip().endswith("line 19999")
    assert 60_000 < len(tail) <= 66_000


def test_off_shows_nothing():
    out, err = run(
        "group.call('print', 'x'); group.call('write', 2, 'y\\n'); group.call('child', 'z')",
        "logs='off'",
    )
    assert (out, err) == ("", "")


def test_inherit_shows_lines_without_a_prefix():
    out, err = run(
        "group.call('print', 'bare'); group.call('write', 2, 'err\\n')", "logs='inherit'"
    )
    assert out == "bare\nbare\n"
    assert err == "err\nerr\n"


# -- who reads slowly -----------------------------------------------------------------------------


@pytest.mark.parametrize("logs", ["prefix"])
def test_a_worker_does_not_wait_for_a_reader_of_the_driver_that_has_stopped(logs):
    """Nobody reads the driver's stdout: 60 MB are printed and calls go on."""
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2, logs={logs!r})
began = time.monotonic()
group[0].options(timeout=20).call("many", 60)
value = group.options(timeout=20).call("echo", 1)
os.write(int(sys.argv[1]), json.dumps([value, time.monotonic() - began]).encode() + b"\\n")
sys.stdin.readline()
group.close()
os.write(int(sys.argv[1]), b"closed\\n")
"""
    read, write = os.pipe()
    with Script(code, str(write), pass_fds=(write,)) as script:
        os.close(write)
        assert readable(read, 40), script.errors()
        value, seconds = eval(os.read(read, 4096))
        assert value == [1, 1]
        assert seconds < 20
        text = in_thread(script.output)  # now somebody reads
        script.tell()
        assert readable(read, 20)
        assert os.read(read, 100) == b"closed\n"
        assert script.end() == 0
        shown = text.value(20)
        errors = script.errors()
    os.close(read)
    lines = shown.splitlines()
    assert len(lines) < 600_000
    if not shown.endswith("x\n"):
        lines.pop()  # close() cuts off a reader that is slow even now: a test of its own
    broken = [line for line in lines if not line.endswith("x" * 99) and "drop" not in line.lower()]
    assert broken == [], broken[:3]
    notes = (shown + errors).lower()
    counts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) lines?", notes)]
    xs = sum(line.endswith("x" * 99) for line in lines)
    assert xs + sum(counts) <= 600_000
    if shown.endswith("x\n"):
        assert xs + sum(counts) == 600_000, (xs, counts)


def test_what_was_printed_before_the_end_reaches_a_slow_reader_whole():
    """`python train.py | slow filter`: the reader reads on, so no line is torn and none is lost."""
    code = f"""{WORKER}
with WorkerGroup(Worker, 1) as group:
    group.call("many", 4)
"""
    with Script(code) as script:
        pace = threading.Event()
        data = b""
        while more := os.read(script.process.stdout.fileno(), 65536):
            data += more
            pace.wait(0.03)
        assert script.end() == 0
        lines = data.decode().splitlines()
        assert len(lines) == 40_000
        assert all(line.endswith("x" * 99) for line in lines)


def test_close_does_not_wait_for_a_reader_that_has_stopped():
    code = f"""{WORKER}
group = WorkerGroup(Worker, 1)
group.call("many", 5)
began = time.monotonic()
group.close()
os.write(int(sys.argv[1]), b"%.2f" % (time.monotonic() - began))
"""
    read, write = os.pipe()
    with Script(code, str(write), pass_fds=(write,)):
        os.close(write)
        assert readable(read, 15), "close() waits for whoever reads the driver's stdout"
        assert float(os.read(read, 100)) < 5
    os.close(read)


def test_a_driver_whose_stdout_is_closed_goes_on():
    code = f"""{WORKER}
group = WorkerGroup(Worker, 2)
hear()
for number in range(50):
    group.call("print", "x" * 10000)
os.write(int(sys.argv[1]), b"went on")
group.close()
os.write(int(sys.argv[1]), b" closed")
"""
    read, write = os.pipe()
    with Script(code, str(write), pass_fds=(write,)) as script:
        os.close(write)
        script.process.stdout.close()
        script.tell()
        heard = b""
        while readable(read, 10) and (more := os.read(read, 100)):
            heard += more
        assert heard == b"went on closed"
        script.process.wait(10)
        assert "Traceback" not in script.errors()
        script.process.stdout = open(os.devnull, "rb")  # noqa: SIM115  # for the clean-up
    os.close(read)


# -- where lines go -------------------------------------------------------------------------------


def test_a_replaced_stdout_gets_the_lines():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with WorkerGroup(Worker, 2) as group:
            group.call("print", "to a StringIO")
            group.call("error", "to another")
    assert out.getvalue().count("to a StringIO\n") == 2
    assert err.getvalue().count("to another\n") == 2
    assert "\x1b" not in out.getvalue()


def test_stdout_replaced_after_the_start_gets_the_lines():
    with WorkerGroup(Worker, 1) as group:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            group.call("print", "later")
            until(lambda: "later" in out.getvalue(), 5)
    assert out.getvalue().endswith("later\n")


def test_pytests_capsys_sees_the_lines(capsys):
    with WorkerGroup(Worker, 2) as group:
        group.call("print", "captured")
    assert capsys.readouterr().out.count("captured\n") == 2


def test_pytests_capfd_sees_the_lines(capfd):
    with WorkerGroup(Worker, 2) as group:
        group.call("print", "captured")
    assert capfd.readouterr().out.count("captured\n") == 2


def test_a_stdout_that_raises_harms_nobody(caplog):
    class Broken(io.StringIO):
        def write(self, text):
            raise ValueError("I/O operation on closed file")

    with contextlib.redirect_stdout(Broken()), WorkerGroup(Worker, 1) as group:
        group.call("print", "x")
        assert group.call(lambda worker: 5) == [5]


def test_a_driver_without_stdout_goes_on():
    code = f"""{WORKER}
out = sys.stdout
sys.stdout = sys.stderr = None
with WorkerGroup(Worker, 2) as group:
    group.call("print", "x")
    value = group.call("echo", 3)
sys.stdout = out
say(value=value)
"""
    with Script(code) as script:
        assert script.line()["value"] == [3, 3]
        assert script.end() == 0


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_driver_with_closed_standard_descriptors_goes_on(closed, tmp_path):
    answer = tmp_path / "answer"
    code = f"""{WORKER}
for fd in {closed!r}: os.close(fd)
with WorkerGroup(Worker, 2) as group:
    group.call("print", "x")
    with open({str(answer)!r}, "w") as file: file.write(repr(group.call("echo", 3)))
os._exit(0)
"""
    with Script(code) as script:
        assert script.end() == 0
    assert answer.read_text() == "[3, 3]"


# -- colour ---------------------------------------------------------------------------------------


def on_a_terminal(env):
    code = PRELUDE + WORKER + "with WorkerGroup(Worker, 2) as group: group.call('print', 'word')\n"
    outer, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=inner, stdout=inner, stderr=inner,
        env={k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | env,
        start_new_session=True,
    )  # fmt: skip
    os.close(inner)
    text = b""
    try:
        while readable(outer, SECONDS):
            try:
                text += os.read(outer, 65536)
            except OSError:
                break
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(SECONDS)
        os.close(outer)
    return text.decode()


def test_a_terminal_gets_colour_and_whole_lines():
    text = on_a_terminal({"TERM": "xterm-256color"})
    assert "\x1b[" in text
    assert text.count("word\r\n") == 2
    for line in text.splitlines():
        assert line.count("\x1b[") % 2 == 0, "every colour is switched off again"


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_color_and_dumb_terminals_get_none(env):
    assert "\x1b" not in on_a_terminal({"TERM": "xterm"} | env)


def test_a_pipe_gets_no_colour():
    out, _ = run("group.call('print', 'word')")
    assert "\x1b" not in out


def test_logging_of_the_library_is_silent_by_default():
    out, err = run("group.call('echo', 1)")
    assert (out, err) == ("", "")


def test_a_fast_printer_costs_no_time_of_its_neighbour():
    with WorkerGroup(Worker, 2, logs="off") as group:
        flood = group[0].submit(lambda worker: [print("x" * 99) for _ in range(200_000)] and None)
        began = time.monotonic()
        for _ in range(20):
            group[1].call(lambda worker: None)
        assert time.monotonic() - began < 10
        flood.result(60)
