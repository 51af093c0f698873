"""The shape of the source: imports point down only, what is light stays light, files stay short.

`LAYERS` is the table. A module may import from the rows below its own and from nowhere else; what
stands under `if TYPE_CHECKING:` is free, for it moves nothing at run time.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
SOURCE = REPOSITORY / "src"

# From the top down. The first word says what a row is. `name.*` is a whole package, whose files may
# import each other, but not in a circle.
LAYERS = (
    ("other ways in", "torch", "vllm", "compat.*", "cli.*", "testing.*"),
    ("what vLLM's workers become", "_vllm_rank"),
    ("what a group of these is given", "_vllm_options"),
    ("the public names", ""),
    ("the user's verbs", "_group"),
    ("where its engine sits", "_seat"),
    ("their parts", "_start", "_views", "_health", "_shared_array"),
    ("py-spy, where it is there", "_pyspy"),
    ("the choice of an engine", "backends"),
    ("engines", "backends.local", "backends.inline", "backends.ray"),
    ("what engines share", "backends.boot", "backends.ending"),
    ("the launcher's driver", "backends.launching", "backends.link", "backends.reports"),
    ("threads and ends", "_lifetime", "_keeper", "_callbacks", "logs.show"),
    ("the pump", "_pump"),
    ("its lead, loops, sockets and wake-ups", "_lead", "_port", "_sockets", "_telling", "_wake"),
    ("futures and the ledger", "_future", "_ledger", "_lookout", "_ranks"),
    ("answers", "_answers", "_options", "_engine"),
    ("what a wait is for", "_report"),
    ("calls", "_background", "_calls", "_slow"),
    ("what no handler strikes", "_shielded"),
    ("the launcher", "_launcher"),
    ("how it starts ranks", "_starting"),
    ("its parts", "_dump", "_line", "_preload", "_reaper", "_log_pipes"),
    ("making a process", "_spawn"),
    ("the worker", "_worker"),
    ("its loop", "_serve"),
    ("values that come late", "_late"),
    ("user code, as a value, and the end", "_outcome", "_methods", "_context", "_exit"),
    ("the wire's slow path", "wire.culprit"),
    ("its walk", "wire.parts"),
    ("definitions on the wire, and tensors", "wire.byvalue", "wire.gpu", "wire.tensors"),
    (
        "the wire", "wire.codec", "wire.joint", "wire.channel", "wire.worker_channel",
        "wire.control", "logs.lines",
    ),
    ("frames", "wire.frames"),
    ("large payloads", "wire.arena"),
    ("their readers", "wire.borrowing"),
    ("their writer", "wire.lending"),
    ("its memory", "wire.writing"),
    ("its parts", "wire.blocks", "wire.mapping"),
    ("what a rank finds", "_environment"),
    ("what a group is", "_spec"),
    ("what it inherits, and when it starts again", "_inherited", "_restart"),
    (
        "the ground", "_checks", "_cpu", "_procfs", "_rankinfo", "_spin", "_stacks", "_status",
        "_messages", "_deadline", "_interrupts", "_planned", "errors", "wire", "logs",
    ),
)  # fmt: skip

# Imports that point up all the same. Each is made inside a function, when it is first needed.
UPWARD = {
    ("wire.codec", "wire.byvalue"): "the slow path, which most calls never need",
    ("wire.codec", "wire.tensors"): "torch, where it is there and a tensor is sent",
    ("wire.codec", "wire.gpu"): "the same, where it lies in a GPU's memory",
    ("wire.codec", "wire.culprit"): "the slow path, when something cannot travel",
    ("_worker", "testing._inject"): "a rank that a test has planned faults for",
    ("backends.inline", "testing._inject"): "likewise, in a thread",
}

# A child must start fast and the launcher must stay clean, so their imports are counted: no more
# than these, whatever lies below them.
CHILDREN = {
    "_worker": {
        "_context", "_exit", "_messages", "_planned", "_serve", "_spin", "_status",
        "testing._inject", "wire.arena", "wire.frames", "wire.worker_channel",
    },
    "_serve": {
        "_context", "_late", "_messages", "_methods", "_outcome", "_rankinfo", "_status",
        "wire.codec", "wire.frames", "wire.lending", "wire.worker_channel",
    },
    "_launcher": {
        "_deadline", "_dump", "_line", "_log_pipes", "_messages", "_reaper", "_spawn", "_starting",
        "_worker", "wire.control",
    },
    "_starting": {
        "_line", "_messages", "_preload", "_procfs", "_spawn", "_worker",
    },
    "_line": set(),
    "_preload": {"_deadline", "_procfs", "_spawn", "wire.control"},
    "_dump": {"_deadline", "_messages", "_procfs"},
    "_reaper": {"_deadline", "_messages", "_procfs", "_spawn"},
    "_log_pipes": {"logs.lines"},
    "_spawn": {"logs.lines"},
}  # fmt: skip

# The files that may import each, be it in a function. All else is the standard library.
OTHERS = {
    "cloudpickle": ["wire.byvalue"],
    "numpy": ["_shared_array"],
    "pytest": ["testing.plugin"],
    "ray": ["backends.ray"],
    # The drop-in sets torch's threads, as the original does, if torch is there.
    "setproctitle": ["_vllm_rank"],
    "vllm": ["vllm", "_vllm_options", "_vllm_rank"],
    "torch": ["torch", "compat._vllm_environment", "wire.gpu", "wire.tensors"],
}

# A millisecond or more each, or thread starters; a rank and its launcher do without until they need
# them.
HEAVY = (
    "asyncio", "concurrent.futures", "contextlib", "dataclasses", "enum", "inspect", "logging",
    "multiprocessing", "pickle", "re", "socket", "subprocess", "typing",
)  # fmt: skip
FOREIGN = ("cloudpickle", "numpy", "ray", "torch")

# Long enough to be read at one sitting. Above `LONG` a file's docstring says why it is one file.
LONG = 400


class Import(NamedTuple):
    module: str  # where it stands, without `rankwise.`
    line: int
    target: str  # `_deadline`, `wire.codec` for one of ours; `torch.distributed` for another
    ours: bool
    deferred: bool  # inside a function

    def __str__(self) -> str:
        name = f"rankwise.{self.target}".rstrip(".") if self.ours else self.target
        return f"{path_of(self.module)}:{self.line} imports {name}"


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE / "rankwise").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def path_of(module: str) -> Path:
    path = SOURCE.joinpath("rankwise", *module.split(".")) if module else SOURCE / "rankwise"
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.relative_to(REPOSITORY)


@cache
def modules() -> tuple[str, ...]:
    return tuple(sorted(name_of(path) for path in (SOURCE / "rankwise").rglob("*.py")))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(one for module in modules() for one in imports_of(module))


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse((REPOSITORY / path_of(module)).read_text())
    for node, deferred in walk(tree, False):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            assert not node.level, f"{path_of(module)}:{node.lineno}: name the package in full"
            base = node.module or ""
            full = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if ours(name) in modules() else base for name in full]
        for name in names:
            target = ours(name)
            if target is None:
                yield Import(module, node.lineno, name, False, deferred)
            else:
                yield Import(module, node.lineno, target, True, deferred)


def ours(name: str) -> str | None:
    """`_deadline` for `rankwise._deadline`, "" for `rankwise`, None for what is not ours."""
    package, _, rest = name.partition(".")
    return rest if package == "rankwise" else None


def walk(node: ast.AST, deferred: bool) -> Iterator[tuple[ast.AST, bool]]:
    """The imports below `node` that are carried out, each with whether a function defers it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from walk(other, deferred)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child, deferred
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, deferred or inside)


def layer_of(module: str) -> int | None:
    for index, (_, *names) in enumerate(LAYERS):
        if module in names or module.partition(".")[0] in packages(index):
            return index
    return None


def packages(index: int) -> list[str]:
    """The whole packages in row `index`."""
    return [name[:-2] for name in LAYERS[index] if name.endswith(".*")]


# --- what is light --------------------------------------------------------------------------------


def loaded_by(code: str, *flags: str) -> set[str]:
    """The modules that a fresh interpreter has after `code` and had not before it."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); before = set(sys.modules)\n{code}\n"
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_rankwise_loads_nothing_heavy():
    heavy = loaded_by("import rankwise") & {*HEAVY, *FOREIGN}
    assert not heavy, f"`import rankwise` loads {', '.join(sorted(heavy))}"


def test_the_public_names_load_no_numpy_torch_ray_or_asyncio():
    loaded = loaded_by("import rankwise\nfor name in rankwise.__all__: getattr(rankwise, name)")
    heavy = loaded & {"asyncio", "numpy", "ray", "torch"}
    assert not heavy, f"a public name of rankwise loads {', '.join(sorted(heavy))}"


def test_import_rankwise_takes_less_than_30_ms():
    # CPU time, the best of three: what else the machine is doing must not decide this.
    code = (
        f"import sys, time; sys.path.insert(0, {str(SOURCE)!r}); began = time.process_time()\n"
        "import rankwise\nprint(time.process_time() - began)"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(3)]
    assert min(map(float, runs)) < 0.030


@pytest.mark.parametrize("module", ["_worker", "_launcher"])
def test_a_child_loads_nothing_heavy_to_start(module):
    loaded = loaded_by(f"import rankwise.{module}", "-I", "-S")
    heavy = loaded & {*HEAVY, *FOREIGN}
    assert not heavy, (
        f"`import rankwise.{module}` loads {', '.join(sorted(heavy))}: every rank would wait for it"
    )


# --- imports point down only ----------------------------------------------------------------------


def test_every_module_has_its_layer():
    lost = [str(path_of(module)) for module in modules() if layer_of(module) is None]
    assert not lost, f"in no row of LAYERS in {Path(__file__).name}: {', '.join(lost)}"


def test_imports_point_down_only():
    wrong = []
    for one in imports():
        here, there = layer_of(one.module), layer_of(one.target) if one.ours else None
        if here is None or there is None or one.module == one.target:
            continue  # not ours, or told of by another test
        if there > here or (there == here and one.target.partition(".")[0] in packages(here)):
            continue
        if (one.module, one.target) in UPWARD:
            if not one.deferred:
                wrong.append(f"{one} at its top, and may do so only inside a function")
            continue
        what = "its own row" if there == here else f"the row {LAYERS[there][0]!r} above it"
        wrong.append(
            f"{one}, which is in {what}; it is in {LAYERS[here][0]!r}, and imports point down only"
        )
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle():
    """Of those that a module makes as it is imported: a circle of these may fail or not, depending
    on who comes first."""
    edges: dict[str, set[str]] = {module: set() for module in modules()}
    for one in imports():
        if one.ours and not one.deferred and one.target != one.module:
            edges[one.module].add(one.target)
    # Take away whoever imports nobody that is left, and whom nobody that is left imports.
    while free := [
        module
        for module, targets in edges.items()
        if not targets & edges.keys() or not any(module in others for others in edges.values())
    ]:
        for module in free:
            del edges[module]
    circle = [
        f"{path_of(module)} > {', '.join(sorted(targets & edges.keys()))}"
        for module, targets in edges.items()
    ]
    assert not circle, "a circle of imports:\n" + "\n".join(circle)


def test_every_exception_to_the_layers_is_needed():
    edges = {(one.module, one.target) for one in imports() if one.ours}
    layers = {edge: (layer_of(edge[0]), layer_of(edge[1])) for edge in UPWARD}
    unused = [
        f"{here} > {there}"
        for (here, there), (high, low) in layers.items()
        if (here, there) not in edges or (high is not None and low is not None and low > high)
    ]
    assert not unused, f"no longer needed in UPWARD: {', '.join(unused)}"


def test_a_child_imports_only_what_it_is_allowed():
    wrong = [
        f"{one}, and {one.module} may import only {', '.join(sorted(CHILDREN[one.module]))}"
        for one in imports()
        if one.ours and one.module in CHILDREN and one.target not in CHILDREN[one.module]
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_not_the_standard_library_is_imported_where_the_table_says():
    wrong = []
    for one in imports():
        package = one.target.partition(".")[0]
        if one.ours or package in sys.stdlib_module_names:
            continue
        if package not in OTHERS:
            wrong.append(f"{one}, and nothing in src may: it is in no row of OTHERS")
        elif one.module not in OTHERS[package]:
            wrong.append(
                f"{one}, and only {', '.join(map(str, map(path_of, OTHERS[package])))} may"
            )
    assert not wrong, "\n".join(wrong)


# --- the public names -----------------------------------------------------------------------------


def test_all_is_the_public_namespace():
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import rankwise\n"
        "for name in rankwise.__all__: getattr(rankwise, name)\n"
        "print(*rankwise.__all__); print(*vars(rankwise)); print(*dir(rankwise))\n"
        "print(*(name for name in sys.modules if name.startswith('rankwise.')))\n"
        "names = {}; exec('from rankwise import *', names); print(*names)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    listed, *spaces = ([*line.split()] for line in printed)
    assert listed == sorted(set(listed)), "__all__ is sorted and names nothing twice"
    there, shown, loaded, starred = ({*space} for space in spaces)
    # Submodules are there once they are imported; `annotations` and TYPE_CHECKING are syntax.
    beside = {name.split(".")[1] for name in loaded} | {"annotations", "TYPE_CHECKING"}
    public = {name for name in there if not name.startswith("_")} - beside
    assert public == set(listed)
    assert set(listed) <= shown
    assert starred - {"__builtins__"} == set(listed)


# --- files ----------------------------------------------------------------------------------------


def test_a_long_file_says_why_it_is_one():
    wrong = []
    for module in modules():
        path = path_of(module)
        text = (REPOSITORY / path).read_text()
        lines = text.count("\n")
        why = re.search(r"\bone file\b|\blong\b", ast.get_docstring(ast.parse(text)) or "")
        if lines > LONG and not why:
            wrong.append(
                f"{path} has {lines} lines: split it, or let its docstring say why it is one file"
            )
    assert not wrong, "\n".join(wrong)


def repository_files() -> Iterator[Path]:
    """What belongs to the repository: all but what git ignores, or hidden folders without git."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
        paths = [REPOSITORY / os.fsdecode(name) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [
            path
            for path in REPOSITORY.rglob("*")
            if not any(
                (part.startswith(".") and part != ".ci") or part == "__pycache__"
                for part in path.relative_to(REPOSITORY).parts
            )
        ]
    return (path for path in paths if path.is_file())


# In pieces, or this file would be the first to be found.
FORBIDDEN = {
    "the host of a package registry": "|".join(
        re.escape(".".join(host))
        for host in (
            ("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"),
            ("deb", "debian", "org"), ("download", "pytorch", "org"), ("anaconda", "org"),
            ("crates", "io"), ("proxy", "golang", "org"),
        )
    ),
    "a path of one developer's machine": r"(?<![\w./~-])/" + "work" + r"/\w",
}  # fmt: skip


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what):
    pattern = re.compile(FORBIDDEN[what].encode(), re.IGNORECASE)
    found = []
    for path in repository_files():
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number} names {what}")
    assert not found, "\n".join(found)
