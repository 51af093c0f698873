"""Where there is no Linux, or an older one: processes are refused in words, threads work."""

from __future__ import annotations

import os
import types

import pytest
from drivers import Script

from rankwise import WorkerGroup

# What other systems' Pythons do not have, as far as rankwise uses it.
ELSEWHERE = """
import mmap, select, signal, socket
sys.platform = "darwin"
gone = {
    os: "memfd_create MFD_CLOEXEC MFD_ALLOW_SEALING eventfd eventfd_read eventfd_write EFD_CLOEXEC "
        "EFD_NONBLOCK sched_getaffinity sched_setaffinity posix_fallocate pidfd_open P_PIDFD",
    select: " ".join(name for name in dir(select) if name.lower().startswith("epoll")),
    signal: "pidfd_send_signal sigtimedwait sigwaitinfo",
    socket: "SOCK_CLOEXEC SOCK_NONBLOCK SO_PEERCRED MSG_CMSG_CLOEXEC",
    mmap: "MAP_POPULATE MADV_HUGEPAGE MADV_DONTFORK MADV_REMOVE",
}
for module, names in gone.items():
    for name in names.split():
        delattr(module, name) if hasattr(module, name) else None
import builtins
real = builtins.open
def without_proc(path, *args, **options):
    if str(path).startswith("/proc"): raise FileNotFoundError(2, "no such file", path)
    return real(path, *args, **options)
builtins.open = without_proc

from rankwise import WorkerGroup
class Worker:
    def echo(self, value): return value
try: WorkerGroup(Worker, 2)
except Exception as error: say(refused=[type(error).__name__, str(error)])
with WorkerGroup(Worker, 2, backend="inline") as group:
    say(
        called=group.call("echo", 1), submitted=group.submit("echo", 2).result(),
        states=[health.state for health in group.health()], stacks=len(str(group.stacks())) > 0,
    )
"""
WORDS = (
    "backend='local' needs Linux 5.4 or newer, and this is {}: backend='inline' works everywhere"
)


def test_elsewhere_processes_are_refused_and_threads_work():
    with Script(ELSEWHERE) as script:
        assert script.line() == {"refused": ["RuntimeError", WORDS.format("darwin")]}
        said = script.line()
        assert (said["called"], said["submitted"]) == ([1, 1], [2, 2])
        assert (said["states"], said["stacks"]) == (["idle", "idle"], True)
        assert script.end() == 0
        assert script.errors() == ""


@pytest.mark.parametrize(
    ("release", "refused"),
    [("5.3.18-lp152", True), ("4.19.0", True), ("5.4.0-42-generic", False), ("6.1", False)],
)
def test_an_older_linux_is_refused_by_its_name(release, refused, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(release=release))
    if refused:
        with pytest.raises(RuntimeError) as caught:
            WorkerGroup(dict, 1)
        assert str(caught.value) == WORDS.format(f"Linux {release}")
    else:
        WorkerGroup(dict, 1).close()
