"""The floor: what the machine allows a Python driver that calls Python workers, and nothing else.

One socketpair a rank, polled by both sides, `pickle` in both directions. No futures, no ids, no
errors, no order, no death: whatever a library costs beyond this is its own.

Its ranks are forked from one process and share its pages. Spawned, each an interpreter of its own
(`spawned`), the same code costs more where ranks take turns on a processor: each finds its own
copies of everything out of the caches.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys


class Floor:
    """`world_size` processes, forked or `spawned`, that answer `call(x)` with `x`."""

    def __init__(self, world_size: int, spawned: bool = False) -> None:
        self._sockets = []
        self._pids = []
        for _ in range(world_size):
            ours, theirs = socket.socketpair()
            if spawned:
                command = [sys.executable, __file__, str(theirs.fileno())]
                process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
                pid, process.returncode = process.pid, 0  # `close` reaps it
            else:
                pid = os.fork()
                if not pid:
                    ours.close()
                    _serve(theirs)
            theirs.close()
            ours.setblocking(False)
            self._sockets.append(ours)
            self._pids.append(pid)

    def call(self, value: object) -> list[object]:
        data = pickle.dumps(("echo", (value,), {}), 5)
        for sock in self._sockets:
            sock.send(data)
        answers = []
        for sock in self._sockets:
            recv = sock.recv
            while True:
                try:
                    answers.append(pickle.loads(recv(65536)))
                    break
                except BlockingIOError:
                    os.sched_yield()
        return answers

    def close(self) -> None:
        for sock, pid in zip(self._sockets, self._pids, strict=True):
            sock.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(sock: socket.socket) -> None:
    sock.setblocking(False)
    recv, send = sock.recv, sock.send
    while True:
        try:
            data = recv(65536)
        except BlockingIOError:
            os.sched_yield()
            continue
        if not data:
            os._exit(0)
        _, args, _ = pickle.loads(data)
        send(pickle.dumps(args[0], 5))


if __name__ == "__main__":  # a spawned rank
    _serve(socket.socket(fileno=int(sys.argv[1])))
