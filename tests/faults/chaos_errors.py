"""What an error of the chaos has to say: who, and why. Each kind by its own contract."""

from __future__ import annotations

import re
import signal

from chaos_ranks import Refused

from rankwise import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    RemoteError,
    SerializationError,
    StartupError,
    WorkerDied,
    WorkerGroupError,
)

STATES = {"running", "queued", "stopped", "starting", "closing", "dead"}
DEATHS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT}  # that the troublemaker deals out
# Its launcher ended, or the launcher does not say how a rank ended: it is stopped.
NO_RANKS_WORD = re.compile(
    r"its launcher \(pid \d+\) was killed by SIGKILL"
    r"|rank \d+ \(pid \d+\): it closed its channel but did not exit"
)
IN_A_CALL = re.compile(r"rank \d+ \(pid \d+\) in Diarist\.")


def check(error: BaseException, world_size: int, ended: bool) -> None:
    """Raise AssertionError unless `error` may come, and names a rank (or the launcher) and a cause.

    ended: whether somebody has closed the group, or restarted it.
    """
    text = "\n".join((str(error), *getattr(error, "__notes__", ())))
    match error:
        case CallTimeout():
            _check_timeout(error, text, world_size)
        case WorkerDied():
            assert 0 <= error.rank < world_size, text
            assert error.signal in DEATHS, text
            name = signal.Signals(error.signal).name
            assert f"rank {error.rank} (pid {error.pid}) was killed by {name}" in text, text
        case GroupBroken():
            _check_broken(error, text, world_size)
        case GroupClosed():
            # Nobody's rank is to blame: the caller is.
            assert ended, text
            assert re.search(r"group was (closed|shut down)|is (closed|being restarted)", text), (
                text
            )
        case StartupError():
            if error.rank is None:
                assert NO_RANKS_WORD.search(text), text
            else:
                assert f"rank {error.rank}" in text, text
                assert error.phase in text, text
        case Refused():
            assert isinstance(error.__cause__, RemoteError), repr(error.__cause__)
            assert 0 <= error.__cause__.rank < world_size, text
            assert IN_A_CALL.search(text), text
        case SerializationError():
            assert IN_A_CALL.search(text), text
            assert "it does not travel" in text, text
        case _:
            raise AssertionError(f"this may not come: {error!r}") from error


def _check_timeout(error: CallTimeout, text: str, world_size: int) -> None:
    assert error.method and error.method in text, text
    assert not set(error.missing) & set(error.answered), text
    assert {*error.missing, *error.answered} <= set(range(world_size)), text
    for of_each in (error.states, error.seconds, error.cpu, error.stacks, error.last_lines):
        assert set(of_each) == set(error.missing), (text, of_each)
    for rank in error.missing:
        assert re.search(rf"^  rank {rank}: pid \d+, \w", text, re.MULTILINE), text
        assert error.states[rank] in STATES, (text, error.states)
        assert error.seconds[rank] >= 0.0, (text, error.seconds)
    if error.missing:
        assert re.search(rf"waiting for ranks? .*\b{error.missing[-1]}\b", text), text
    else:  # the last answer came between a waiter's last look and these words
        assert re.search(r"waited (its \d|no longer)", text), text


def _check_broken(error: GroupBroken, text: str, world_size: int) -> None:
    first = error.first
    assert error.__cause__ is first, text
    if isinstance(first, WorkerDied):
        check(first, world_size, False)
        assert str(first) in text, text
    elif isinstance(first, (Refused, SerializationError)):
        check(first, world_size, False)
        assert re.search(r"rank \d+ \(pid \d+\) failed in .* had not returned from it", text), text
        assert error.stacks.keys() <= set(range(world_size)), text
    else:
        assert type(first) is WorkerGroupError, repr(first)
        assert NO_RANKS_WORD.search(text), text
