"""The poll learns from what was waited before, and knows the machine."""

from __future__ import annotations

import pytest

from rankwise._spin import CROWDED, LEAST, MOST, Spin, spin_for


def test_calls_that_come_back_to_back_are_polled_for() -> None:
    spin = Spin(MOST, learns=True)
    for _ in range(10):
        spin.waited(MOST / 2)
        assert spin.budget == MOST


def test_one_long_wait_is_all_that_paced_calls_burn() -> None:
    spin = Spin(MOST, learns=True)
    for _ in range(10):
        spin.waited(5e-3)
        assert spin.budget == LEAST


def test_two_short_waits_running_bring_the_poll_back_and_one_does_not() -> None:
    spin = Spin(MOST, learns=True)
    budgets = []
    for wait in (5e-3, 1e-5, 5e-3, 1e-5, 1e-5, 1e-5, 5e-3):
        spin.waited(wait)
        budgets.append(spin.budget)
    assert budgets == [LEAST, LEAST, LEAST, LEAST, MOST, MOST, LEAST]


@pytest.mark.parametrize("wish", [0, 0.25])
def test_a_number_is_honoured_whatever_comes(wish: float) -> None:
    spin = spin_for(wish, processes=9, cpus=2)
    for wait in (5e-3, 1e-5, 1e-5):
        spin.waited(wait)
        assert spin.budget == wish


@pytest.mark.parametrize(("processes", "most"), [(2, MOST), (3, CROWDED), (9, CROWDED)])
def test_with_fewer_cpus_than_processes_the_poll_is_shorter(processes: int, most: float) -> None:
    assert spin_for("auto", processes, cpus=2).budget == most


def test_it_can_be_read() -> None:
    assert str(spin_for("auto", 2, cpus=4)) == "auto (500 us now)"
    assert str(spin_for(0, 2, cpus=4)) == "0 us"
