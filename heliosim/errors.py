"""Errors a user can cause. Each carries the data it speaks of, and its text is one line that can stand alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class HelioSimError(Exception):
    """Base of all errors with a clear cause outside the program; the command line prints it and exits with 2."""


class InputError(HelioSimError):
    """A file, field or value that cannot be used.

    ``where``: file and line or field; ``value``: what stands there; ``remedy``: what to do.
    """

    def __init__(self, where: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(
            where, value, problem, remedy
        )  # args as the constructor takes them: SimPy makes a new one from them
        self.where, self.value, self.problem, self.remedy = where, value, problem, remedy

    def __str__(self) -> str:
        shown = repr(self.value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        return f"{self.where}: {self.problem} (value: {shown}). {self.remedy}"


class UnknownNameError(InputError):
    """A name that is not in a list of known ones; says the nearest."""

    def __init__(self, where: str, name: str, known: Iterable[str]) -> None:
        self.known = sorted(known)
        near = difflib.get_close_matches(str(name), self.known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(where, name, "unknown name", f"{hint}Known: {', '.join(self.known) or 'none'}.")
        self.args = (where, name, tuple(self.known))


@contextmanager
def about(file: Path | str) -> Iterator[None]:
    """Have errors raised inside name the file (or the part of one) they come from, unless they do."""
    try:
        yield
    except InputError as error:
        if str(file) not in error.where:
            error.where = f"{file}: {error.where}"
        raise


class OutOfRangeError(InputError):
    """A question outside what a profile was calibrated for."""


class MemoryBudgetError(InputError):
    """A memory budget that cannot hold what it must."""


class LoadError(HelioSimError):
    """Weights that could not be brought to a device. Nothing is resident behind it, unless ``is_intact``: then what was
    resident still is. An engine that raises it can be asked to load again.
    """

    def __init__(self, problem: str, is_intact: bool = False) -> None:
        super().__init__(problem, is_intact)
        self.problem, self.is_intact = problem, is_intact

    def __str__(self) -> str:
        rest = "what was resident still is" if self.is_intact else "nothing is loaded now"
        return f"load: {self.problem}; {rest}."


class DeviceMemoryError(MemoryBudgetError):
    """A device with less memory than its engine was told. ``available_bytes``: what there is for weights and KV; None:
    unknown. ``is_intact``: what was resident still is.
    """

    available_bytes: int | None = None
    is_intact: bool = False
