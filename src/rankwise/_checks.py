"""Checks of single arguments: each returns the value that it stands for, or says what is wrong.

The message is one sentence that names the argument, what was given and what would be right. A
TypeError is for a value of the wrong kind, a ValueError for one of the right kind that will not do.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")

MAX_HASH_SEED = 2**32 - 1  # CPython's own limit for PYTHONHASHSEED


def shorten(value: object) -> str:
    """One line of at most 80 characters that shows a value in an error."""
    try:
        text = repr(value)
    except Exception:  # the error to tell is ours, not that of somebody's __repr__
        text = f"<{type(value).__name__} object>"
    text = " ".join(text.splitlines())
    return text if len(text) <= 80 else f"{text[:77]}..."


def wrong_type(label: str, right: str, given: object) -> TypeError:
    return TypeError(f"{label} must be {right}, not {shorten(given)}")


def wrong_value(label: str, right: str, given: object) -> ValueError:
    return ValueError(f"{label} must be {right}, not {shorten(given)}")


def at_least(least: int, label: str, right: str, value: Any) -> int:
    """An int, or what stands for one (numpy's ints do, a bool is a slip)."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise wrong_type(label, right, value)
    if number < least:
        raise wrong_value(label, right, value)
    return number


def seconds(label: str, right: str, value: object, *, zero: bool) -> float:
    """A finite, positive number, or one that may be 0 too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(label, right, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise wrong_value(label, right, value)
    return number


def choice(label: str, choices: tuple[str, ...], value: object, right: str = "") -> str:
    """One of a few words; ``right`` says what will do where it is more than these."""
    right = right or f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    if not isinstance(value, str):
        raise wrong_type(label, right, value)
    if value not in choices:
        raise wrong_value(label, right, value)
    return value


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is an ordered collection of items, which a str is not meant to be."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def one_a_rank(label: str, items: Sequence[T], size: int) -> Sequence[T]:
    """The items themselves, if there are as many as ranks."""
    if len(items) != size:
        right = f"one item for each of the {size} ranks"
        raise ValueError(f"{label} must have {right}, not {len(items)}")
    return items


def check_variables(label: str, variables: object, reserved: Mapping[str, str]) -> dict[str, str]:
    """One mapping of environment variables, copied; their values may be secrets: none is shown.

    ``reserved`` has the variables that must not be set, each with who sets it.
    """
    if not isinstance(variables, Mapping):
        kind = type(variables).__name__
        raise TypeError(f"{label} must be a mapping of str to str, not of type {kind}")
    checked = dict(variables)
    for key, value in checked.items():
        if not isinstance(key, str):
            raise TypeError(f"{label} must have names of type str, not {shorten(key)}")
        if not key or "=" in key or not _fits_in_environment(key):
            raise ValueError(f"{label} has {key!r}, which cannot be the name of a variable")
        if not isinstance(value, str):
            kind = type(value).__name__
            raise TypeError(f"{label} must give {key!r} a str, not a value of type {kind}")
        if not _fits_in_environment(value):
            raise ValueError(f"{label} must give {key!r} a value that an environment can hold")
        if key in reserved:
            raise ValueError(f"{label} must not set {key!r}, which {reserved[key]} sets")
        if key == "PYTHONHASHSEED" and value not in ("", "random") and not is_hash_seed(value):
            right = f"'random' or an integer from 0 to {MAX_HASH_SEED}"
            raise ValueError(f"{label} must give {key!r} {right}, not {shorten(value)}")
    return checked


def check_hash_seeds(environments: Mapping[int, Mapping[str, str]]) -> None:
    """Refuses what users give the ranks where PYTHONHASHSEED differs between them."""
    seeds = {rank: variables.get("PYTHONHASHSEED") for rank, variables in environments.items()}
    first, *others = seeds
    for rank in others:
        if seeds[rank] != seeds[first]:
            raise ValueError(
                "env must give all ranks one PYTHONHASHSEED, so that sets iterate alike on them,"
                f" not {seeds[first]!r} to rank {first} and {seeds[rank]!r} to rank {rank}"
            )


def is_hash_seed(text: str) -> bool:
    """Whether PYTHONHASHSEED=text fixes the seed (empty and "random" do not)."""
    return text.isascii() and text.isdigit() and int(text) <= MAX_HASH_SEED


def _fits_in_environment(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
