"""Python stacks of ranks: read, compared, and put into words. Pure.

faulthandler's text > parse > main thread's frames > place: "shard.py:88 all_reduce"
stacks of all ranks > Stacks > str(): who stands where, then each stack, equal ones once
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_AT = "at "
_BEFORE_US = 4  # frames
_LIBRARY = os.path.dirname(os.__file__) + os.sep  # the standard library, and what pip installs

# A thread, and one of its frames, as faulthandler writes them (3.14: with the thread's name).
_THREAD = re.compile(
    r"(?:(?:Current t|T)hread 0x[0-9a-f]+(?: \[(.*)\])?|Stack) \(most recent call first\):$"
)
_FRAME = re.compile(r'  File (?:"(.*)"|\?\?\?), line (\d+|\?\?\?) in (.*)$')


class Frame(NamedTuple):
    """One frame of a Python stack. `file` "" and `line` 0 where they are not known."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        name = os.path.basename(self.file) or "???"
        return f"{name}:{self.line} {self.function}"


class Thread(NamedTuple):
    """One thread: its frames, the innermost first, and the lines that say so."""

    name: str | None
    main: bool  # it ran the handler that wrote this, and handlers run in the main thread
    frames: tuple[Frame, ...]
    lines: tuple[str, ...]


class RankStack(NamedTuple):
    """Where one rank is, at one moment.

    state: "starting", "idle", "running", "stopped" (SIGSTOP), "closing" or "dead".
    method: the call it is in, None where it is in none. seconds: for how long.
    stack: its Python stacks as faulthandler writes them: of all threads, the main one ("Current
        thread") last; of the main one alone where it is in C code. None where there is none to be
        had: `reason` says why.
    native: what py-spy says, C frames included where it can, if there is no `stack` or it was asked
        for, and py-spy is installed.
    last_line: the last that it wrote to its descriptors 1 and 2; "" if nothing.
    """

    rank: int
    state: str
    pid: int
    method: str | None
    seconds: float
    stack: str | None
    reason: str | None = None
    native: str | None = None
    last_line: str = ""

    @property
    def place(self) -> str:
        """Where its main thread is: "shard.py:88 all_reduce"; "" where that is not known, or is
        rankwise's own code (an idle rank waits there)."""
        return place(self.stack)

    def _standing(self) -> str:
        """What is said of it beside the others."""
        if self.stack is None:
            return f"without a stack ({self.reason})"
        if self.state in ("idle", "closing") or not self.place:
            return self.state
        return f"{_AT}{self.place}"


class Stacks(tuple[RankStack, ...]):
    """The stacks of all ranks, in rank order. `str()` says where they differ, then shows each."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.difference()}\n{self._texts()}".rstrip("\n")

    def difference(self) -> str:
        """Who stands where, in one line: `ranks 0, 2 at a.py:8 reduce; rank 1 at b.py:4 load`."""
        frames = {each.rank: user_frames(main_frames(each.stack)) for each in self}
        told: dict[str, list[int]] = {}
        for rank, words in _apart({each.rank: each._standing() for each in self}, frames).items():
            told.setdefault(words, []).append(rank)
        return "; ".join(f"{ranks_text(ranks)} {words}" for words, ranks in told.items())

    def _texts(self) -> str:
        """Every stack; those that are equal once."""
        told: dict[str, list[RankStack]] = {}
        for each in self:
            text = shown(each.stack) if each.stack else f"  no stack: {each.reason}"
            if each.native:
                text += "\n  py-spy says:\n    " + each.native.replace("\n", "\n    ")
            told.setdefault(text, []).append(each)
        parts = []
        for text, ranks in told.items():
            parts.append(f"\n{ranks_text([each.rank for each in ranks])}:\n{text}\n")
        return "".join(parts)


# -- reading ----------------------------------------------------------------------------------


def parse(text: str) -> list[Thread]:
    """The threads in `text`, in its order: the newest first, as faulthandler has them."""
    threads: list[Thread] = []
    for line in text.splitlines():
        header = _THREAD.match(line)
        if header is not None:
            threads.append(Thread(header.group(1), not line.startswith("Thread "), (), ()))
        elif line.startswith(" ") and threads:
            name, main, frames, said = threads[-1]
            found = _FRAME.match(line)
            if found is not None:
                file, number, function = found.groups()
                frame = Frame(file or "", int(number) if number.isdigit() else 0, function)
                frames = (*frames, frame)
            threads[-1] = Thread(name, main, frames, (*said, line))
    return threads


def main_frames(stack: str | None) -> tuple[Frame, ...]:
    """The frames of the main thread, the innermost first."""
    threads = parse(stack) if stack else []
    return next((thread.frames for thread in reversed(threads) if thread.main), ())


def user_frames(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """`frames` without those of rankwise itself, which called the rest."""
    end = len(frames)
    # `python -c`, or the first frames of a thread, have called us.
    for outer in range(end - 1, max(-1, end - 1 - _BEFORE_US), -1):
        if frames[outer].file.startswith(_OURS):
            end = outer
            while end and frames[end - 1].file.startswith(_OURS):
                end -= 1
            break
    return tuple(frames[:end])


def place(stack: str | None) -> str:
    """Where the main thread of `stack` is; "" where that is not known, or is rankwise itself."""
    return place_of(user_frames(main_frames(stack)))


def place_of(frames: Sequence[Frame]) -> str:
    """The innermost of `frames`; where that is a library's, also the user's own that led to it."""
    if not frames:
        return ""
    own = next((frame for frame in frames if not _is_library(frame)), frames[0])
    return str(own) if own is frames[0] else f"{frames[0]}, from {own}"


def _is_library(frame: Frame) -> bool:
    return frame.file.startswith((_LIBRARY, _OURS, "<frozen ")) or any(
        part in frame.file for part in ("/site-packages/", "/dist-packages/")
    )


# -- comparing --------------------------------------------------------------------------------


def _apart(standing: Mapping[int, str], frames: Mapping[int, Sequence[Frame]]) -> dict[int, str]:
    """`standing`, where ranks that came to one place by different ways are told apart."""
    told = dict(standing)
    for words in dict.fromkeys(standing.values()):
        ranks = [rank for rank in standing if standing[rank] == words]
        if not words.startswith(_AT) or len({tuple(frames[rank]) for rank in ranks}) == 1:
            continue
        longest = max(len(frames[rank]) for rank in ranks)
        ways = [[_at(frames[rank], depth) for rank in ranks] for depth in range(longest)]
        fork = next(way for way in ways if len(set(way)) > 1)
        for rank, frame in zip(ranks, fork, strict=True):
            if frame is not None:
                told[rank] = f"{words}, by way of {frame}"
    return told


def _at(frames: Sequence[Frame], depth: int) -> Frame | None:
    return frames[depth] if depth < len(frames) else None


# -- words ------------------------------------------------------------------------------------


def shown(stack: str) -> str:
    """`stack` as it is shown: the main thread first, no thread numbers, nothing of rankwise's."""
    threads = parse(stack)
    main = next((thread for thread in reversed(threads) if thread.main), None)
    others = [thread for thread in reversed(threads) if not thread.main]
    if not threads:
        return stack.rstrip()
    parts = []
    for thread in others if main is None else [main, *others]:
        frames = user_frames(thread.frames)
        cut = len(thread.frames) - len(frames) if frames else 0
        body = thread.lines[: len(thread.lines) - cut]
        if not thread.main:
            body = (f"  another thread{f' ({thread.name})' if thread.name else ''}:", *body)
        parts.append("\n".join(body))
    return "\n".join(parts)


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0, 1, 2`: sixteen of them at most."""
    listed = list(ranks)
    if len(listed) == 1:
        return f"rank {listed[0]}"
    return f"ranks {', '.join(map(str, listed[:16]))}{', ...' if len(listed) > 16 else ''}"
