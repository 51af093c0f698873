"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations


class Steps:
    """A worker that notes, a line each, what is done at its end and in what order."""

    def __init__(self, path):
        import atexit
        import multiprocessing
        import os
        import sys
        import threading
        import weakref

        self.fd = fd = os.open(path, os.O_WRONLY | os.O_APPEND)

        def note(what):
            os.write(fd, f"{what}\n".encode())

        def outlive_the_main_thread():
            threading.main_thread().join()
            note("thread")

        class Garbage:
            def __init__(self):
                self.me = self

            def __del__(self):
                note("garbage")

        self.note = note
        context = multiprocessing.get_context("fork")
        there, here = context.Pipe(duplex=False)
        child = context.Process(target=lambda: (there.recv(), note("child")))
        child.start()
        servant = context.Process(target=threading.Event().wait, daemon=True)
        servant.start()
        self.servant = servant.pid
        threading.Thread(target=outlive_the_main_thread).start()
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
        # The last registered is the first called; multiprocessing's own is the first registered.
        atexit.register(lambda: (note("atexit"), here.send("go")))
        weakref.finalize(sys, note, "finalize")
        self.kept = Garbage()

    def last_call(self, path):
        import ctypes
        import sys

        sys.kept = open(path, "w")  # noqa: SIM115  # nobody closes it
        sys.kept.write("in a buffer")
        print("of Python", end="")
        ctypes.CDLL(None).printf(b"of C")
        return self.servant

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.note("exit")

    def __del__(self):
        self.note("object")


class ExitsInC:
    """A worker that has C's own exit tell a file."""

    def __init__(self, path, device):
        import ctypes
        import sys
        from pathlib import Path

        from rankwise import _procfs

        self.path = Path(path)
        self.function = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(
            lambda status, _: self.path.touch()
        )
        assert ctypes.CDLL(None).on_exit(self.function, None) == 0
        sys.kept = self
        if device:
            _procfs.DEVICES = ("/dev/zero",)
            self.file = open("/dev/zero")  # noqa: SIM115
