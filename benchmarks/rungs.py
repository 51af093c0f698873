"""The rungs of the ladder (`ladder.py`): each is the one below it, with one promise more.

    Floor > Framed > Asleep > Shared > Struck

All of it is one loop on either side, without layers, and for one shape of call: no futures, no
options, deadlines, cancels, order of failures, views or large payloads.
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
import signal
import socket
import threading
import time
from os import sched_yield
from struct import Struct

from floor import Floor

clock = time.monotonic
dumps, loads = pickle.dumps, pickle.loads
HEADER = Struct("<HBBIQQ")  # magic, kind, flags, sequence, call, length: as rankwise's own
SIZE = HEADER.size
pack, unpack = HEADER.pack, HEADER.unpack_from
MAGIC, CALL, OK, FAILED = 0x5701, 2, 16, 17
LINE = 8  # words of a cache line
BELL, NEWS, RUNNING, SINCE, DONE = (LINE * n for n in range(5))
PAGE = 512  # words a rank
POLL = 200e-6  # seconds
LOOKS = 64


class Worker:
    def echo(self, value: object) -> object:
        return value


class Rung:
    """Forked ranks, as the floor's. `serve` is theirs, `call` the driver's."""

    def __init__(self, world_size: int) -> None:
        words = memoryview(mmap.mmap(-1, 8 * PAGE * world_size)).cast("Q")
        self.words = [words[rank * PAGE : (rank + 1) * PAGE] for rank in range(world_size)]
        self.ranks = tuple(range(world_size))
        self.socks: list[socket.socket] = []
        self.pids: list[int] = []
        for rank in self.ranks:
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if not pid:
                ours.close()
                theirs.setblocking(False)
                self.serve(theirs, self.words[rank])
                os._exit(0)
            theirs.close()
            ours.setblocking(False)
            self.socks.append(ours)
            self.pids.append(pid)
        self.sends = [sock.send for sock in self.socks]
        self.recvs = [sock.recv for sock in self.socks]
        self.sequence = 0

    def serve(self, sock: socket.socket, words: memoryview) -> None:
        raise NotImplementedError

    def call(self, value: object) -> list[object]:
        raise NotImplementedError

    def close(self) -> None:
        for sock, pid in zip(self.socks, self.pids, strict=True):
            sock.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Framed(Rung):
    """Any method; what it raises comes back. Both ends know that a frame is whole and the one that
    is due: what is lost, torn or foreign is found, and not waited for."""

    def serve(self, sock: socket.socket, words: memoryview) -> None:
        recv, send = sock.recv, sock.send
        due = 0
        worker = Worker()
        while True:
            try:
                data = recv(65536)
            except BlockingIOError:
                sched_yield()
                continue
            if not data:
                return
            magic, kind, _, sequence, call_id, length = unpack(data)
            if magic != MAGIC or kind != CALL or sequence != due or length != len(data) - SIZE:
                return
            due += 1
            try:
                method, args, kwargs = loads(data[SIZE:])
                answer, body = OK, dumps(getattr(worker, method)(*args, **kwargs), 5)
            except Exception as error:
                answer, body = FAILED, dumps(error, 5)
            send(pack(MAGIC, answer, 0, sequence, call_id, len(body)) + body)

    def call(self, value: object) -> list[object]:
        body = dumps(("echo", (value,), {}), 5)
        due = self.sequence
        self.sequence = due + 1
        frame = pack(MAGIC, CALL, 0, due, due, len(body)) + body
        for send in self.sends:
            send(frame)
        answers = []
        for recv in self.recvs:
            while True:
                try:
                    data = recv(65536)
                except BlockingIOError:
                    sched_yield()
                    continue
                break
            magic, kind, _, sequence, call_id, length = unpack(data)
            if magic != MAGIC or sequence != due or call_id != due or length != len(data) - SIZE:
                raise RuntimeError("garbled")
            if kind != OK:
                raise loads(data[SIZE:])
            answers.append(loads(data[SIZE:]))
        return answers


class Asleep(Framed):
    """Who waits for long sleeps. A page of memory says what each rank runs and since when, and
    rings, so that nobody looks at an empty socket."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.epoll = select.epoll()
        for sock in self.socks:
            self.epoll.register(sock.fileno(), select.EPOLLIN)

    def serve(self, sock: socket.socket, words: memoryview) -> None:
        recv, send = sock.recv, sock.send
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        due = 0
        data = b""
        worker = Worker()
        now = time.monotonic_ns
        while True:
            if not data:
                looks = 0
                until = clock() + POLL
                while not data:
                    while words[BELL] <= due:
                        sched_yield()
                        looks += 1
                        if clock() > until:
                            poll.poll()
                            break
                        if not looks % LOOKS:
                            break  # the socket is the truth, whatever the word says
                    try:
                        data = recv(65536)
                    except BlockingIOError:
                        continue
                    if not data:
                        return
            magic, kind, _, sequence, call_id, length = unpack(data)
            end = SIZE + length
            if magic != MAGIC or kind != CALL or sequence != due or len(data) < end:
                return
            frame, data = data[SIZE:end], data[end:]
            due += 1
            words[SINCE] = now()
            words[RUNNING] = call_id
            try:
                method, args, kwargs = loads(frame)
                answer, body = OK, dumps(getattr(worker, method)(*args, **kwargs), 5)
            except Exception as error:
                answer, body = FAILED, dumps(error, 5)
            send(pack(MAGIC, answer, 0, sequence, call_id, len(body)) + body)
            words[NEWS] = due
            words[DONE] = call_id
            words[RUNNING] = 0

    def wait(self, words: memoryview, due: int) -> None:
        until = clock() + POLL
        while words[NEWS] <= due:
            if clock() < until:
                sched_yield()
            else:
                self.epoll.poll()
                return

    def call(self, value: object) -> list[object]:
        body = dumps(("echo", (value,), {}), 5)
        due = self.sequence
        self.sequence = due + 1
        frame = pack(MAGIC, CALL, 0, due, due, len(body)) + body
        for send, words in zip(self.sends, self.words, strict=True):
            send(frame)
            words[BELL] = due + 1
        answers = []
        for recv, words in zip(self.recvs, self.words, strict=True):
            while words[NEWS] <= due:
                self.wait(words, due)
            data = recv(65536)
            magic, kind, _, sequence, call_id, length = unpack(data)
            if magic != MAGIC or sequence != due or call_id != due or length != len(data) - SIZE:
                raise RuntimeError("garbled")
            if kind != OK:
                raise loads(data[SIZE:])
            answers.append(loads(data[SIZE:]))
        return answers


class Open:
    """A call that is open, and what it has."""

    __slots__ = ("answers", "done", "error", "gate", "id", "ranks")

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.id = 0
        self.ranks = ranks
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.done = False
        self.error: Exception | None = None
        self.gate: threading.Lock | None = None


class Shared(Asleep):
    """Any thread may call at any time, in one order. Who owes what is known, and a rank that has
    gone ends it. One of those that wait receives for all."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.lock = threading.RLock()
        self.broken: Exception | None = None
        self.last_id = 0
        self.inflight: list[dict[int, Open]] = [{} for _ in self.ranks]
        self.sent = [0] * world_size
        self.received = [0] * world_size
        self.leader: Open | None = None
        self.sleepers: list[Open] = []

    def send(self, call: Open, body: bytes) -> None:
        size = len(body)
        for rank in call.ranks:
            self.inflight[rank][call.id] = call
            due = self.sent[rank]
            self.sends[rank](pack(MAGIC, CALL, 0, due, call.id, size) + body)
            self.sent[rank] = due + 1
            self.words[rank][BELL] = due + 1

    def call(self, value: object) -> list[object]:
        body = dumps(("echo", (value,), {}), 5)
        call = Open(self.ranks)
        with self.lock:
            if self.broken is not None:
                raise self.broken
            self.last_id = call.id = self.last_id + 1
            self.send(call, body)
            if self.leader is None:
                self.leader = call
            else:
                call.gate = threading.Lock()
                call.gate.acquire()
                self.sleepers.append(call)
        while not call.done:
            if self.leader is call:
                self.lead(call)
            elif call.gate is not None:
                call.gate.acquire()  # settled, or to lead
        with self.lock:
            if self.leader is call:
                self.leader = None
                while self.sleepers and self.leader is None:
                    if not (last := self.sleepers.pop()).done:
                        self.leader = last
                        assert last.gate is not None
                        last.gate.release()
        if call.error is not None:
            raise call.error
        values = []
        for rank in call.ranks:
            kind, data = call.answers[rank]
            if kind != OK:
                raise loads(data)
            values.append(loads(data))
        return values

    def ready(self, call: Open) -> list[int]:
        """The ranks that have answered since; waits where there is none."""
        received = self.received
        found = [rank for rank in self.ranks if self.words[rank][NEWS] > received[rank]]
        if not found:
            for rank in call.ranks:
                if rank not in call.answers:
                    self.wait(self.words[rank], received[rank])
                    break
        return found

    def lead(self, call: Open) -> None:
        came = [(rank, self.recvs[rank](65536)) for rank in self.ready(call)]
        with self.lock:
            self.feed(came)

    def feed(self, came: list[tuple[int, bytes]]) -> None:
        received, inflight = self.received, self.inflight
        for rank, data in came:
            if not data:
                self.broken = RuntimeError(f"rank {rank} has gone")
                for call in inflight[rank].values():
                    call.error = self.broken
                    self.settle(call)
                continue
            while data:
                magic, kind, _, sequence, call_id, length = unpack(data)
                end = SIZE + length
                if magic != MAGIC or sequence != received[rank] or len(data) < end:
                    raise RuntimeError("garbled")
                call = inflight[rank].pop(call_id)
                received[rank] = sequence + 1
                call.answers[rank] = (kind, data[SIZE:end])
                if len(call.answers) == len(call.ranks):
                    self.settle(call)
                data = data[end:]

    def settle(self, call: Open) -> None:
        call.done = True
        if call.gate is not None:
            call.gate.release()


class Struck(Shared):
    """An exception out of a signal handler, between any two bytecodes, loses no byte: bytes leave
    and enter by one C call that also stores them, and the last step lets go of what was stored."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.going: list[int] = []
        self.came: list[tuple[int, bytes]] = []

    def send(self, call: Open, body: bytes) -> None:
        size, sent = len(body), self.sent
        frames = [pack(MAGIC, CALL, 0, sent[rank], call.id, size) + body for rank in call.ranks]
        for rank in call.ranks:
            self.inflight[rank][call.id] = call
        self.going.extend(map(socket.socket.send, self.socks, frames))
        for rank in call.ranks:
            self.words[rank][BELL] = sent[rank] = sent[rank] + 1
        self.going.clear()

    def lead(self, call: Open) -> None:
        ready = self.ready(call)
        socks = [self.socks[rank] for rank in ready]
        sizes = [65536] * len(ready)
        self.came.extend(zip(ready, map(socket.socket.recv, socks, sizes), strict=True))
        with self.lock:
            self.feed(self.came)
        self.came.clear()


RUNGS: dict[str, type] = {
    "floor": Floor,
    "framed": Framed,
    "asleep": Asleep,
    "shared": Shared,
    "struck": Struck,
}
