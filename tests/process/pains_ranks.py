"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import time

from rankwise import worker_info


class FailsTwice:
    """Rank 1 cannot be made, and none of the ranks ends well either."""

    def __init__(self) -> None:
        import atexit

        atexit.register(self.fail_again)
        if worker_info().rank == 1:
            print("reading the weights", flush=True)
            raise ValueError("the weights are of another model")

    def fail_again(self, *error: object) -> None:
        raise RuntimeError("nothing to clean up")

    def __enter__(self) -> FailsTwice:
        return self

    __exit__ = fail_again


class Profiler:
    """Needs its time to write what it has gathered."""

    def __init__(self, path: str) -> None:
        self.path = f"{path}.{worker_info().rank}"

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *error: object) -> None:
        with open(self.path, "w") as file:
            for part in range(30):
                file.write(f"{part}\n")
                file.flush()
                time.sleep(0.05)
