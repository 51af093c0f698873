"""How often a call goes to the kernel: once a rank to send, and once a rank to receive."""

from __future__ import annotations

import threading
from socket import socket

import pytest
from held_ranks import Held

from rankwise import WorkerGroup
from rankwise.wire import joint

CALLS = 200


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside a busy thread"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_call_is_one_send_and_one_receive_a_rank(
    monkeypatch: pytest.MonkeyPatch, ranks: int, busy: bool
) -> None:
    counts = {"send": 0, "receive": 0}
    send, receive = joint.SEND, joint.RECEIVE

    def counted_send(sock: socket, data: bytes, flags: int) -> int:
        counts["send"] += 1
        return send(sock, data, flags)

    def counted_receive(sock: socket, size: int) -> bytes:
        counts["receive"] += 1
        return receive(sock, size)

    over = threading.Event()
    thread = threading.Thread(target=lambda: [None for _ in iter(over.is_set, True)])
    with WorkerGroup(Held, ranks) as group:
        group.call("echo", 0)
        if busy:
            thread.start()
        monkeypatch.setattr(joint, "SEND", counted_send)
        monkeypatch.setattr(joint, "RECEIVE", counted_receive)
        try:
            for number in range(CALLS // 10 if busy else CALLS):
                assert group.call("echo", number) == [number] * ranks
                assert counts["send"] == ranks * (number + 1)
                # A look at the kernel, now and then, may come just before the answer does.
                assert ranks * (number + 1) <= counts["receive"] <= ranks * (number + 1) * 1.5 + 5
        finally:
            over.set()
            if busy:
                thread.join()
            monkeypatch.undo()
