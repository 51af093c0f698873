"""What `__main__` defines travels by value, and the main module is never imported again."""

from __future__ import annotations

import subprocess
import sys

import pytest

BODY = """
import os, sys, dataclasses, enum
from rankwise import WorkerGroup
print("top level", flush=True)

@dataclasses.dataclass
class Point:
    x: int
    y: int = 0

class Colour(enum.Enum):
    RED = 1

class Mine(Exception):
    def __init__(self, code, *, extra=None):
        super().__init__(code)
        self.code, self.extra = code, extra

FACTOR = 3

def scale(point):
    return Point(point.x * FACTOR, point.y * FACTOR)

class Base:
    def who(self): return "base"

class Worker(Base):
    def scale(self, point):
        assert type(point) is Point
        return scale(point)
    def fails(self): raise Mine(7)
    def colour(self): return Colour.RED
    def who(self): return super().who() + "+"

def closure(factor):
    class Local:
        def times(self, value): return value * factor
    return Local

with WorkerGroup(Worker, 2) as group:
    points = group.call(Worker.scale, Point(1, 2))
    assert points == [Point(3, 6)] * 2 and type(points[0]) is Point
    try:
        group[1].call("fails")
    except Mine as error:
        assert error.code == 7 and type(error) is Mine
        assert "rank 1" in "".join(error.__notes__)
    else:
        raise AssertionError
    assert group.call("colour") == [Colour.RED] * 2
    assert group[0].call("colour") is Colour.RED
    assert group.call(Base.who) == ["base+"] * 2
    assert group.call(lambda worker, n: worker.scale(Point(n)).x, 5) == [15, 15]
with WorkerGroup(closure(4), 2) as group:
    assert group.call("times", 2) == [8, 8]
with WorkerGroup(lambda: Worker(), 1, start_method="forkserver") as group:
    assert group[0].call("scale", Point(2)) == Point(6)
print("end", flush=True)
"""


def check(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == "top level\nend\n"


def options(tmp_path):
    return dict(capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_a_script_without_a_main_guard(tmp_path):
    (tmp_path / "script.py").write_text(BODY)
    check(subprocess.run([sys.executable, "script.py"], **options(tmp_path)))


def test_python_dash_m(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(BODY)
    check(subprocess.run([sys.executable, "-m", "package"], **options(tmp_path)))


def test_python_dash_c(tmp_path):
    check(subprocess.run([sys.executable, "-c", BODY], **options(tmp_path)))


def test_standard_input(tmp_path):
    check(subprocess.run([sys.executable, "-"], input=BODY, **options(tmp_path)))


def test_a_notebooks_namespace(tmp_path):
    """Cells are exec'd in the namespace of a `__main__` that has no file."""
    (tmp_path / "kernel.py").write_text(
        "import sys, types\n"
        "main = types.ModuleType('__main__')\n"
        "sys.modules['__main__'] = main\n"
        f"body = {BODY!r}\n"
        "first, second = body.split('class Base:', 1)\n"
        "for cell in (first, 'class Base:' + second):\n"
        "    exec(compile(cell, '<cell>', 'exec'), main.__dict__)\n"
    )
    check(subprocess.run([sys.executable, "kernel.py"], **options(tmp_path)))


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_a_class_defined_anew_is_a_new_class_in_the_workers(start_method, tmp_path):
    body = f"""
from rankwise import WorkerGroup
for version in (1, 2):
    exec(f"class Worker:\\n    def version(self): return {{version}}")
    with WorkerGroup(Worker, 1, start_method={start_method!r}) as group:
        assert group.call("version") == [version]
        assert group.call(Worker.version) == [version]
print("top level\\nend")
"""
    check(subprocess.run([sys.executable, "-c", body], **options(tmp_path)))


PLACES = """
import sys, time
from rankwise import WorkerGroup
class Worker:
    def fails(self):
        raise ValueError("no")
    def sleeps(self):
        time.sleep(20)
with WorkerGroup(Worker, 1) as group:
    try:
        group[0].call("fails")
    except ValueError as error:
        print(error.__cause__.remote_traceback)
    future = group[0].submit("sleeps")
    while not (place := group.stacks()[0].place):
        pass
    print(place)
    group.kill()
"""


def test_a_scripts_own_class_has_its_places_in_tracebacks_and_stacks(tmp_path):
    (tmp_path / "script.py").write_text(PLACES)
    done = subprocess.run([sys.executable, "script.py"], **options(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'script.py", line 6, in fails\n    raise ValueError("no")\n' in done.stdout
    assert done.stdout.endswith("script.py:8 sleeps\n")
