"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os
import signal
import threading

from rankwise import current_call


class Worker:
    def __init__(self):
        self.inside = 0
        self.ran = []
        self.threads = {"__init__": whereabouts()}

    def __enter__(self):
        self.threads["__enter__"] = whereabouts()
        return self

    def __exit__(self, *error):
        if "told" in self.__dict__:
            with open(f"{self.told}.{os.environ['RANK']}", "w") as file:
                file.write(repr(whereabouts()))

    def tell_at_exit(self, path):
        self.told = path

    def where(self):
        return whereabouts()

    def alone(self, item=None):
        """How many calls are inside, and whether this is still the call that it was."""
        me = current_call().id
        self.inside += 1
        try:
            seen = [self.inside]
            for _ in range(3):
                os.sched_yield()
                seen.append(self.inside)
            self.ran.append(item)
            return max(seen), current_call().id == me
        finally:
            self.inside -= 1

    def fails(self, error, item=None):
        self.ran.append(item)
        raise error

    def hold(self, path):
        self.inside += 1
        with open(path, "rb") as file:
            file.read()
        self.inside -= 1

    def write_then_die(self, path):
        with open(f"{path}.{os.environ['RANK']}", "a") as file:
            file.write("x")
        if os.environ["RANK"] == "1":
            os._exit(3)

    def meet(self, path, mode):
        """Comes back once another rank is in this method, with the other mode."""
        with open(path, mode):
            return True

    def take_ran(self):
        ran, self.ran = self.ran, []
        return ran


def whereabouts():
    """Whether this is the main thread: the process's, Python's, and where signals arrive."""
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        may_set_handlers = True
    except ValueError:
        may_set_handlers = False
    main = threading.main_thread()
    is_main = threading.current_thread() is main
    return threading.get_native_id() == os.getpid(), is_main, may_set_handlers


class Travels:
    reduced = rebuilt = None

    def __reduce__(self):
        return rebuild, (whereabouts(),)


def rebuild(reduced):
    made = Travels()
    made.reduced = reduced
    made.rebuilt = whereabouts()
    return made
