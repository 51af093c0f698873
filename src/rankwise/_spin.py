"""How long to poll before sleeping in the kernel, learned from how long was waited before.

    two waits running shorter than `most`  > poll for up to `most`: calls come back to back
    a wait longer than `most`              > poll for LEAST: they are paced, or work takes long

Who polls answers in microseconds and costs a core; who sleeps costs nothing, and some 5 to 50 us to
wake. So a process polls while what it waits for has lately come soon, and one wait of `most` is all
that it burns before it sleeps at once. With fewer CPUs than processes the poll is shorter: between
two looks it yields, so it takes time from nobody who could run, but each look costs a switch.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

LEAST: Final = 20e-6  # seconds
MOST: Final = 500e-6  # where each process can have a CPU of its own
CROWDED: Final = 200e-6


class Spin:
    """The poll of one process. `budget`: seconds to poll for, now."""

    __slots__ = ("_short", "budget", "learns", "most", "steady")

    def __init__(self, most: float, learns: bool) -> None:
        self.most = most
        self.learns = learns
        self.budget = most
        self.steady = not learns  # one more short wait would change nothing: it need not be told
        self._short = False  # the last wait was short

    def waited(self, seconds: float) -> None:
        """What was waited for has come, after so many `seconds`."""
        if self.learns:
            short = seconds <= self.most
            if not short:
                self.budget = LEAST
            elif self._short:
                self.budget = self.most
            self.steady = self._short and short
            self._short = short

    def __str__(self) -> str:
        budget = f"{self.budget * 1e6:.0f} us"
        return f"auto ({budget} now)" if self.learns else budget


def spin_for(wish: float | str, processes: int, cpus: int) -> Spin:
    """The poll of each of `processes` on `cpus` CPUs; `wish`: "auto", or seconds."""
    if wish != "auto":
        return Spin(float(wish), learns=False)
    return Spin(MOST if processes <= cpus else CROWDED, learns=True)
