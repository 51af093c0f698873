"""Exceptions at every place where CPython could run a signal handler.

    Striker(n, module, ...).run(function, ...)   > its error at the n-th such place of the modules

CPython runs handlers when a Python function begins, after a call of something that is not a plain
Python function, and at a backward jump.
"""

from __future__ import annotations

import dis
import sys
from types import FrameType, ModuleType
from typing import Any


class Struck(BaseException):
    """What a signal handler raises."""


class Striker:
    """Raises `error` at the n-th place of the code of `modules` at which a handler could run.

    countdown: how many such places are still to be passed; above 0 after a run, none was struck.
    """

    def __init__(
        self, countdown: int, *modules: ModuleType, error: type[BaseException] = Struck
    ) -> None:
        self._error = error
        self.countdown = countdown
        self._files = {module.__file__ for module in modules}
        self._previous: dict[FrameType, str | None] = {}

    def run(self, function: Any, *args: Any) -> Any:
        old = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return function(*args)
        finally:
            sys.settrace(old)
            self._previous.clear()

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "call":
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            self._previous[frame] = "RESUME"
        elif event == "opcode":
            if self._previous.get(frame) in HANDLERS_RUN_AFTER:
                self.countdown -= 1
                if self.countdown == 0:
                    raise self._error
            self._previous[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        elif event == "return" and frame.f_back is not None:
            # Back in straight code, unless C code called this: an object being made, a generator.
            # (Our own _methods are called from Python.)
            if not frame.f_code.co_name.startswith(("__", "<")):
                self._previous[frame.f_back] = None
            self._previous.pop(frame, None)
        return self._trace


HANDLERS_RUN_AFTER = {
    "RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD",
    "POP_JUMP_BACKWARD_IF_TRUE", "POP_JUMP_BACKWARD_IF_FALSE",
    "POP_JUMP_BACKWARD_IF_NONE", "POP_JUMP_BACKWARD_IF_NOT_NONE",
}  # fmt: skip
