"""A rank's place, as its process holds it, and what its process imports for that."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise import _rankinfo
from rankwise._rankinfo import RankInfo

INFO = RankInfo(
    rank=3,
    world_size=4,
    local_rank=1,
    local_world_size=2,
    node_rank=1,
    num_nodes=2,
    group="workers",
    device=1,
    master_addr="127.0.0.1",
    master_port=29500,
)


def test_rank_info_is_frozen_and_survives_pickle() -> None:
    again = pickle.loads(pickle.dumps(INFO))
    assert again == INFO
    assert type(again) is RankInfo
    assert "local_world_size=2" in repr(again)
    with pytest.raises(AttributeError):
        again.rank = 0  # type: ignore[misc]


@pytest.mark.parametrize(("module", "name"), [("_rankinfo", "RankInfo"), ("_procfs", "ProcStat")])
def test_the_typed_fields_are_those_that_exist(module: str, name: str) -> None:
    path = Path(_rankinfo.__file__).with_name(f"{module}.py")
    tree = ast.parse(path.read_text())
    (typed,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]
    fields = [n.target.id for n in typed.body if isinstance(n, ast.AnnAssign)]  # type: ignore[union-attr]
    namespace: dict[str, Any] = {"__name__": module}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    assert list(namespace[name]._fields) == fields
    for field in fields:
        assert field in namespace[name].__doc__


@pytest.mark.parametrize("module", ["_rankinfo", "_procfs"])
def test_what_children_import_imports_nothing_slow(module: str) -> None:
    path = Path(_rankinfo.__file__).with_name(f"{module}.py")
    slow = {"typing", "dataclasses", "enum", "re", "inspect", "functools", "subprocess", "asyncio"}
    code = (
        f"import sys; exec(compile(open({str(path)!r}).read(), 'm', 'exec'), {{'__name__': 'm'}});"
        f"print(sorted({slow!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
