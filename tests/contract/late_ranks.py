"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import threading

from rankwise import Late, current_call, worker_info


class Worker:
    """Its late values come when a later call says so: while the rank serves, that is."""

    def __init__(self):
        self.rank = worker_info().rank
        self.gates = {}
        self.order = []

    def gate(self, key):
        return self.gates.setdefault(key, threading.Event())

    def late(self, key, value):
        gate = self.gate(key)

        def get():
            assert gate.wait(20)
            self.order.append(key)
            return self.rank, value

        return Late(get)

    def open(self, *keys):
        for key in keys:
            self.gate(key).set()
        return self.rank

    def fails(self):
        def get():
            raise KeyError("late")

        return Late(get)

    def leaves(self):
        return Late(lambda: exit(3))

    def described(self):
        def get():
            call = current_call()
            name = threading.current_thread().name
            return call.id, call.method, call.remaining(), worker_info().rank, name

        return Late(get)

    def cannot_travel(self):
        return Late(threading.Lock)

    def hidden(self):
        return [Late(int)]

    def large(self, size):
        return Late(lambda: b"x" * size)

    def get_order(self):
        return Late(lambda: self.order)  # made after the late values of the calls before
