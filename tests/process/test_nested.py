"""Groups inside workers and daemons, and processes that workers make."""

from __future__ import annotations

from drivers import Script, Watch, alive, until

WORKER = """
class Inner:
    def echo(self, value): return (worker_info().rank, value)
    def pids(self): return [os.getpid(), os.getppid()]
class Outer:
    def open(self, start_method="spawn"):
        self.inner = WorkerGroup(Inner, 2, name="inner", start_method=start_method)
        return self.inner.call("pids")
    def call(self, value): return self.inner.call("echo", value)
    def close(self): self.inner.close()
    def pids(self): return [os.getpid(), os.getppid()]
"""


def test_a_group_inside_a_worker_works_and_goes_with_it():
    code = f"""{WORKER}
with WorkerGroup(Outer, 2) as group:
    pids = group.call("open") + [group.call("pids")]
    say(value=group.call("call", "x"), pids=pids)
    hear()
say(closed=True)
"""
    with Script(code) as script:
        said = script.line()
        assert said["value"] == [[[0, "x"], [1, "x"]]] * 2
        with Watch({pid for group in said["pids"] for pair in group for pid in pair}) as watch:
            script.tell()
            assert script.line()["closed"]
            assert watch.left(0) == []
        assert script.end() == 0


def test_a_nested_group_goes_with_a_killed_driver():
    code = f"""{WORKER}
group = WorkerGroup(Outer, 1)
say(pids=group.call("open") + [group.call("pids")])
hear()
"""
    with Script(code) as script:
        said = script.line()
        with Watch({pid for group in said["pids"] for pair in group for pid in pair}) as watch:
            script.kill()
            assert watch.left(5) == []


def test_a_nested_group_can_be_closed_by_its_worker():
    code = f"""{WORKER}
with WorkerGroup(Outer, 1) as group:
    pids = group.call("open", "forkserver")[0]
    group.call("close")
    say(pids=pids)
    hear()
"""
    with Script(code) as script:
        pids = {pid for pair in script.line()["pids"] for pid in pair}
        until(lambda: not any(map(alive, pids)), 5)
        script.tell()
        assert script.end() == 0
        assert script.errors() == ""


def test_a_group_in_a_daemonic_process_of_multiprocessing():
    code = f"""{WORKER}
import multiprocessing
def work(pipe):
    with WorkerGroup(Inner, 2) as group:
        pipe.send([multiprocessing.current_process().daemon, group.call("echo", "x")])
context = multiprocessing.get_context("fork")
here, there = context.Pipe()
process = context.Process(target=work, args=(there,), daemon=True)
process.start()
say(value=here.recv())
process.join(15)
say(code=process.exitcode)
"""
    with Script(code) as script:
        assert script.line()["value"] == [True, [[0, "x"], [1, "x"]]]
        assert script.line()["code"] == 0
        assert script.end() == 0
        assert script.errors() == ""


def test_a_worker_uses_a_pool_and_subprocesses():
    code = """
    class Worker:
        def pool(self):
            import multiprocessing, operator
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return pool.map(operator.neg, range(5))
        def run(self):
            import subprocess
            return subprocess.run(["cat"], input=b"x", capture_output=True).stdout.decode()
        def system(self): return os.system("exit 3") >> 8
    with WorkerGroup(Worker, 2) as group:
        say(pool=group.call("pool"), run=group.call("run"), system=group.call("system"),
            again=group.call("pool"))
    """
    with Script(code) as script:
        said = script.line()
        assert said["pool"] == said["again"] == [[0, -1, -2, -3, -4]] * 2
        assert said["run"] == ["x", "x"]
        assert said["system"] == [3, 3]
        assert script.end() == 0
        assert script.errors() == ""


def test_a_worker_that_forks_and_returns_in_both_answers_once():
    code = """
    class Worker:
        def fork(self): return os.fork() and os.getpid()
        def echo(self, value): return value
    with WorkerGroup(Worker, 2) as group:
        say(same=group.call("fork") == group.pids, again=[group.call("echo", n) for n in range(20)])
    """
    with Script(code) as script:
        assert script.line() == {"same": True, "again": [[n, n] for n in range(20)]}
        assert script.end() == 0
