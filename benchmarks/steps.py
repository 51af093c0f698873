"""The driver's steps of a call, one by one: microseconds, without anybody to wait for.

    python benchmarks/steps.py [--ranks 1 2 4 8] [--calls 4000]

    make > begin and send ==> (the other ends answer, untimed) > look > receive and feed > value
    at once: all ranks have answered when the driver looks; by turns: one after the other

One thread plays both ends, so nothing is polled, no core is shared and every cache is warm. What is
left is the ledger's, the sockets' and the pickles' part, system calls included (`send, bare` and
`recv, bare` are those alone). The pump's part (submit, lead, wait) is not in it. Each number is the
10th percentile of its calls. It is the instrument for a change there: fewer bytecodes are not less
time, where C calls take their place.
"""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from calls import Echo

from rankwise._answers import take
from rankwise._calls import Call
from rankwise._ledger import Ledger
from rankwise._messages import HEADER, MAGIC, OK
from rankwise._methods import resolve_method
from rankwise._sockets import Sockets
from rankwise._status import LINE, News
from rankwise.wire.codec import encode_call, encode_result


class Steps:
    """One driver of `ranks` ranks, and what each step of its calls has taken, in seconds."""

    def __init__(self, ranks: int) -> None:
        self.took: dict[str, list[float]] = {}
        self._pairs = [socket.socketpair() for _ in range(ranks)]
        self._ranks = tuple(range(ranks))
        self._news = News(ranks)
        self._ledger = Ledger(ranks)
        self._lock = threading.RLock()
        self._sockets = Sockets(
            [near for near, _ in self._pairs], self._ledger, self._lock, lambda: None, None,
            self._news,
        )  # fmt: skip
        self._engine: Any = SimpleNamespace(arena=None)

    def time(self, step: str, run: Callable[..., Any], *args: object) -> Any:
        began = perf_counter()
        value = run(*args)
        self.took.setdefault(step, []).append(perf_counter() - began)
        return value

    def make(self) -> Call:
        name, sent = resolve_method(Echo.echo)
        return Call(name, encode_call(sent, (5,), {}, None, self._ranks), self._ranks)

    def send(self, call: Call) -> None:
        with self._lock:
            assert self._ledger.begin(call)
            self._sockets.send(call)

    def answer(self, call: Call, number: int) -> None:
        body = encode_result(5)
        frame = HEADER.pack(MAGIC, OK, 0, number, call.id, len(body)) + body
        for rank, (_, far) in enumerate(self._pairs):
            far.recv(1 << 16)
            far.send(frame)
            self._news.words[rank * LINE] = number + 1

    def by_turns(self, ready: list[Any]) -> None:
        for channel in ready:
            self._sockets.pull([channel])

    def bare_send(self) -> None:
        for near, _ in self._pairs:
            near.send(b"x" * 40)

    def bare_recv(self) -> None:
        for near, _ in self._pairs:
            near.recv(1 << 16)

    def run(self, calls: int) -> None:
        for number in range(calls):
            call = self.time("make", self.make)
            self.time("begin and send", self.send, call)
            self.answer(call, number)
            ready = self.time("look", self._sockets.told)
            if number % 2:
                self.time("receive and feed, at once", self._sockets.pull, ready)
            else:
                self.time("receive and feed, by turns", self.by_turns, ready)
            assert call.done
            values = self.time("value", take, call, self._engine)
            assert values == [5] * len(self._ranks)
            self.time("send, bare", self.bare_send)
            for _, far in self._pairs:
                far.send(far.recv(1 << 16))
            self.time("recv, bare", self.bare_recv)

    def close(self) -> None:
        self._sockets.close()
        for _, far in self._pairs:
            far.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--calls", type=int, default=4000)
    options = parser.parse_args()
    found = {}
    for ranks in options.ranks:
        steps = Steps(ranks)
        steps.run(options.calls)
        steps.close()
        found[ranks] = {
            step: sorted(took)[len(took) // 10] * 1e6 for step, took in steps.took.items()
        }
    print(f"{'us':<28}" + "".join(f"{ranks:>8} ranks" for ranks in found))
    for step in found[options.ranks[0]]:
        print(f"{step:<28}" + "".join(f"{row[step]:>14.2f}" for row in found.values()))


if __name__ == "__main__":
    main()
