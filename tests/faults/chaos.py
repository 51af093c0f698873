"""Random calls against random faults, seeded, for as long as one likes; ends by proving that
nobody waited, every error says why, and nothing is left.

    python tests/faults/chaos.py --seconds 600 --seed 1     a round of groups, one an episode
    python tests/faults/chaos.py --seed 1 --episode 17      that one again

    Episode > WorkerGroup > callers (threads, a loop): calls, views, limits, cancels, payloads
                          > troublemaker: kills, stops, ends, restarts, at random moments
            > close > every future settled > every error allowed, with a rank and a cause
                    > each rank's diary: no call twice, each caller's calls in its order
            > nothing left: processes, threads, descriptors, mappings (`rankwise.testing`)

The seed fixes what is done and in which order it is drawn; the machine decides how it meets.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import faulthandler
import logging
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from chaos_errors import check
from chaos_ranks import Diarist, Refused

from rankwise import (
    CallTimeout,
    GroupBroken,
    GroupClosed,
    Restart,
    StartupError,
    WorkerGroup,
)
from rankwise.testing import _leaks as leaks

SETTLED = 10.0  # seconds after the end of a group, in which every future must have its outcome
SIZES = (0, 10, 1000, 70_000, 300_000, 4_000_000)  # bytes: in the frame, in the arena, mapped


class Caller:
    """Makes random calls of one group, one after the other; its tokens carry its number."""

    def __init__(self, episode: Episode, number: int) -> None:
        self.episode = episode
        self.number = number
        self.random = random.Random(f"{episode.seed} {number}")
        self.made = 0
        self.sent: list[str] = []
        self.futures: list[Any] = []
        self.seen: collections.Counter[str] = collections.Counter()

    def token(self) -> str:
        self.made += 1
        return f"{self.number}.{self.made}"

    def view(self) -> tuple[Any, list[int]]:
        """A random view of the group, and its ranks."""
        group = self.episode.group
        ranks = self.random.sample(
            range(group.world_size), self.random.randint(1, group.world_size)
        )
        view = group if self.random.random() < 0.5 else group[ranks]
        if view is group:
            ranks = list(range(group.world_size))
        options: dict[str, Any] = {}
        if self.random.random() < 0.3:
            options["timeout"] = self.random.choice((0.0, 0.001, 0.02, 1.0))
        if self.random.random() < 0.2:
            options["return_exceptions"] = True
        if self.random.random() < 0.3:
            options |= {"on_error": self.random.choice(("fail", "continue")), "grace": 0.3}
        return (view.options(**options) if options else view), ranks

    def step(self) -> None:
        """One random call, and what may be done with it."""
        view, ranks = self.view()
        token = self.token()
        data = self.random.randbytes(16) * (self.random.choice(SIZES) // 16)
        chance = self.random.random()
        try:
            if chance < 0.3:
                self.check(view.call(Diarist.echo, token, data), token, ranks, data)
            elif chance < 0.7:
                nap = self.random.choice((0.0, 0.0, 0.001, 0.01))
                future = view.submit(Diarist.echo, token, data, nap)
                self.keep(future, token, ranks, data)
            elif chance < 0.8:
                rank = self.random.randrange(self.episode.group.world_size)
                view.call(Diarist.refuse, token, rank, self.random.choice((0.0, 0.2)))
            elif chance < 0.85:
                view.call(Diarist.keep_to_itself, token)
            elif chance < 0.9:
                for rank, future in zip(ranks, view.submit_each("echo", token, data), strict=True):
                    self.keep(future, token, rank, data)
            elif chance < 0.95:
                parts = [f"{token}" for _ in ranks]
                self.check(view.scatter("echo", parts, data), token, ranks, data)
            else:
                self.episode.group.flush(timeout=0.05)
        except Exception as error:
            self.error(error)

    def keep(self, future: Any, token: str, ranks: Any, data: bytes) -> None:
        self.futures.append((future, token, ranks, data))
        chance = self.random.random()
        if chance < 0.2:
            future.cancel()
        elif chance < 0.4:
            future.add_done_callback(lambda future: future.exception())
        elif chance < 0.5:
            concurrent.futures.wait([future], timeout=0.01)
        elif chance < 0.7:
            self.outcome(*self.futures[-1], patience=self.random.choice((0.0, 0.01, 1.0)))

    def outcome(
        self, future: Any, token: str, ranks: Any, data: bytes, patience: float = 0.0
    ) -> None:
        try:
            self.check(future.result(patience), token, ranks, data)
        except concurrent.futures.CancelledError:
            assert future.cancelled(), repr(future)
            self.seen["cancelled"] += 1
        except Exception as error:
            self.error(error)

    def check(self, value: Any, token: str, ranks: Any, data: bytes) -> None:
        """The value is this call's own, from the ranks it went to."""
        values, expected = ([value], [ranks]) if isinstance(ranks, int) else (value, ranks)
        assert len(values) == len(expected), (token, len(values), expected)
        for one, rank in zip(values, expected, strict=True):
            if isinstance(one, BaseException):
                self.error(one)
            else:
                assert one == (token, rank, data), (token, rank, one[:2])
        self.seen["answered"] += 1

    def error(self, error: BaseException) -> None:
        """It is one of those that may come, and says who and why."""
        self.seen[type(error).__name__] += 1
        if isinstance(error, AssertionError):
            raise error
        self.episode.check(error)
        if isinstance(error, (GroupBroken, GroupClosed)):
            with contextlib.suppress(GroupBroken, GroupClosed, CallTimeout):
                self.episode.group.wait_ready(0.02)
            self.episode.over.wait(0.002)

    def run(self) -> None:
        while not self.episode.over.is_set():
            self.step()

    async def run_in_a_loop(self) -> None:
        while not self.episode.over.is_set():
            view, ranks = self.view()
            token = self.token()
            try:
                future = view.submit(Diarist.echo, token, b"", self.random.choice((0.0, 0.01)))
                self.futures.append((future, token, ranks, b""))
                limit = self.random.choice((0.001, 0.05, 5.0))
                self.check(await asyncio.wait_for(future, limit), token, ranks, b"")
            except asyncio.CancelledError:
                assert self.episode.ended and future.cancelled(), repr(future)
                self.seen["cancelled"] += 1
                self.episode.over.wait(0.002)
            except Exception as error:
                if type(error) is TimeoutError:  # the loop's own; a CallTimeout is the call's
                    self.seen["wait_for"] += 1
                    continue
                self.error(error)


class Episode:
    """One group, from its start to the proof that nothing of it is left."""

    def __init__(self, seed: str, family: leaks.Family) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.over = threading.Event()
        self.ended = False  # closed, or restarted by hand: from then on calls may be told so
        self.family = family
        self.seen: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        before = leaks.take(self.family)
        with tempfile.TemporaryDirectory() as folder:
            self.play(folder)
        self.__dict__.pop("group", None)
        left = leaks.left_since(before)
        assert not left, f"left behind:\n{left}"

    def play(self, folder: str) -> None:
        chance = self.random
        terms = chance.choice((None, None, Restart(2, 0.0), Restart(None, 0.05)))
        self.group = WorkerGroup(
            Diarist,
            chance.randint(1, 4),
            args=(folder,),
            start_method=chance.choice(("spawn", "spawn", "forkserver")),
            restart=terms,
            spin=chance.choice(("auto", "auto", 0)),
            start_timeout=60.0,  # of a restart whose launcher was stopped for good
        )
        callers = [Caller(self, number) for number in range(chance.randint(1, 4))]
        errors: list[BaseException] = []

        def guarded(work: Any) -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        works: list[Any] = [caller.run for caller in callers[1:]]
        works.append(lambda: asyncio.run(callers[0].run_in_a_loop()))
        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        guarded(self.make_trouble)
        self.over.set()
        self.end()
        for thread in threads:
            thread.join(SETTLED)
            assert not thread.is_alive(), f"a caller still waits: {thread.name}"
        for error in errors:
            raise error
        for caller in callers:
            for kept in caller.futures:
                assert kept[0].done(), f"not settled: {kept[0]!r}"
                caller.outcome(*kept)
            self.seen += caller.seen
        self.read_diaries(Path(folder), len(callers))

    # -- trouble ------------------------------------------------------------------------------

    def make_trouble(self) -> None:
        for _ in range(self.random.randint(0, 4)):
            self.over.wait(self.random.random() * 0.3)
            trouble = self.random.choice(
                (
                    self.kill, self.kill, self.crash, self.stop,
                    self.kill_launcher, self.stop_launcher, self.restart,
                )
            )  # fmt: skip
            if trouble():
                self.seen[trouble.__name__] += 1
        self.over.wait(self.random.random() * 0.3)

    def check(self, error: BaseException) -> None:
        check(error, self.group.world_size, self.ended)

    def victim(self) -> int:
        return self.random.choice(self.group.pids)

    def launcher(self) -> int:
        """The pid of the launcher; 0 where there is none, or its ranks have all gone."""
        members = {member.pid: member for member in self.family.members()}
        for pid in self.group.pids:
            if pid in members:
                fields = members[pid].read("stat").rpartition(")")[2].split()
                parent = int(fields[1]) if len(fields) > 1 else 0  # it has gone meanwhile
                if parent in members:
                    return parent
        return 0

    def send(self, pid: int, number: int) -> bool:
        """Whether `pid` was ours and has it now."""
        # A pid of ours: the group is open, so its launcher has not reaped it, or we hit nothing.
        if pid not in {member.pid for member in self.family.members()}:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    def kill(self) -> bool:
        return self.send(self.victim(), signal.SIGKILL)

    def crash(self) -> bool:
        return self.send(self.victim(), self.random.choice((signal.SIGSEGV, signal.SIGABRT)))

    def stop(self) -> bool:
        return self.stop_for_a_while(self.victim())

    def kill_launcher(self) -> bool:
        return self.send(self.launcher(), signal.SIGKILL)

    def stop_launcher(self) -> bool:
        return self.stop_for_a_while(self.launcher())

    def stop_for_a_while(self, pid: int) -> bool:
        """Stop `pid`; in three cases of ten for good, and all must end without it."""
        stopped = self.send(pid, signal.SIGSTOP)
        self.over.wait(self.random.random() * 0.2)
        if self.random.random() < 0.7:
            self.send(pid, signal.SIGCONT)
        return stopped

    def restart(self) -> bool:
        self.ended = True
        try:
            self.group.restart(timeout=0.5)
        except (StartupError, GroupBroken, GroupClosed) as error:
            self.check(error)
            self.seen["restart failed"] += 1  # a rank was killed while it started
        return True

    def end(self) -> None:
        self.ended = True
        how = self.random.choice(("close", "close", "kill", "with", "error", "shutdown"))
        if how == "close":
            self.group.close(timeout=self.random.choice((0.0, 0.5, 2.0)))
        elif how == "kill":
            self.group.kill()
        elif how == "with":
            closing = threading.Timer(2.0, self.group.close, (0.0,))  # a rank may be stopped
            closing.start()
            with self.group:
                pass
            closing.cancel()
            closing.join()
        elif how == "error":
            with contextlib.suppress(KeyError), self.group:
                raise KeyError
        else:
            self.group.shutdown(wait=False, cancel_futures=True)
            self.group.close(1.0)

    # -- proofs -------------------------------------------------------------------------------

    def read_diaries(self, folder: Path, callers: int) -> None:
        """No call ran twice on a rank, and each caller's calls ran in its order."""
        for diary in folder.iterdir():
            tokens = diary.read_text().splitlines()
            twice = [token for token, times in collections.Counter(tokens).items() if times > 1]
            assert not twice, f"rank {diary.name} ran twice: {twice[:5]}"
            for caller in range(callers):
                own = [int(t.split(".")[1]) for t in tokens if t.startswith(f"{caller}.")]
                assert own == sorted(own), f"rank {diary.name}: caller {caller} out of order"


def play(seed: int, seconds: float, first: int = 0, episodes: int | None = None) -> str:
    """Play episodes for `seconds`, or so many. Returns what was seen, in one line; raises
    AssertionError with the episode's number for what must not be."""
    leaks.mark(os.environ)
    read, write = os.pipe()
    family = leaks.Family(os.getpid(), frozenset(), os.readlink(f"/proc/self/fd/{read}"))
    logging.getLogger("rankwise").setLevel(logging.CRITICAL)
    seen: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + seconds
    number = first
    try:
        WorkerGroup(Refused, 1).close()  # what stays for good
        while time.monotonic() < until and (episodes is None or number < first + episodes):
            faulthandler.dump_traceback_later(120, exit=True)
            episode = Episode(f"{seed}.{number}", family)
            try:
                episode.run()
            except BaseException as error:
                error.add_note(f"chaos: --seed {seed} --episode {number}")
                raise
            seen += episode.seen
            number += 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(read)
        os.close(write)
    facts = ", ".join(f"{name} {count}" for name, count in seen.most_common())
    return f"chaos: {number - first} episodes of seed {seed}: {facts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20))
    parser.add_argument("--episode", type=int, help="that one alone")
    given = parser.parse_args()
    if given.episode is None:
        print(play(given.seed, given.seconds))
    else:
        print(play(given.seed, 3600.0, given.episode, 1))


if __name__ == "__main__":
    main()
