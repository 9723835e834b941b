"""What every trace reader shares: the rows, the checks of their values, and what happens to a bad row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from heliosim.errors import InputError, UnknownNameError
from heliosim.types import Seconds

OnBad = Literal["stop", "drop"]

MAX_ARRIVAL_S: Seconds = 2.0**22
"""Times are exact up to here (48 days); a later arrival is refused."""
MAX_TOKENS = 2**31 - 1
MAX_CLASSES = 64


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request. ``arrival_s`` is seconds since the start, None where the source has no times. ``priority``: its
    class, 0 the most urgent; None: the source has no classes.
    """

    arrival_s: Seconds | None
    prompt_tokens: int
    output_tokens: int | None = None
    max_tokens: int | None = None
    task: str = ""
    prompt_ids: tuple[int, ...] | None = None
    hash_ids: tuple[int, ...] | None = None
    id: str | int | None = None
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """A row left out. ``row``: line from 1 (ShareGPT: place in the list); ``value``: what stood there."""

    row: int
    column: str
    value: object
    reason: str

    def __str__(self) -> str:
        shown = repr(self.value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return f"row {self.row}, {self.column}: {self.reason} (value: {shown})"


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows as read, and what became of the rest. ``notes``: what the reader saw or assumed."""

    rows: tuple[TraceRow, ...]
    dropped: tuple[Drop, ...] = ()
    source: str = ""
    kind: str = "mooncake"
    ignored_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Rows that can be used."""
        return len(self.rows)

    @property
    def has_times(self) -> bool:
        """Whether every row has an arrival time (a source has them for all rows or for none)."""
        return all(row.arrival_s is not None for row in self.rows)


def as_tokens(column: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRowError(column, value, "not a whole number of tokens", "Write an integer >= 1.")
    if value < 1:
        problem = "zero length" if value == 0 else "negative length"
        raise BadRowError(column, value, problem, "Write an integer >= 1, or leave the row out.")
    if value > MAX_TOKENS:
        raise BadRowError(column, value, f"more than {MAX_TOKENS} tokens", "Check the column.")
    return value


def as_optional_tokens(column: str, value: object) -> int | None:
    return None if value is None else as_tokens(column, value)


def as_class(column: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
        raise BadRowError(
            column, value, "not a class of requests", f"Write an integer, 0 (urgent) to {MAX_CLASSES - 1}."
        )
    return value


def as_text(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRowError(column, value, "not a text", "Write a name in quotes.")
    return _clean(column, value)


def as_identity(column: str, value: object) -> str | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str):
        raise BadRowError(column, value, "neither a text nor an integer", "Write one of them.")
    return _clean(column, value)


def _clean(column: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(column, value, "holds half a surrogate pair", "Write valid Unicode text.") from None
    return value


def as_ids(column: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise BadRowError(column, value, "not a list of integers", "Write a list of integers >= 0.")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise BadRowError(column, item, "not an integer >= 0 in the list", "Write a list of integers >= 0.")
    return tuple(value)


def as_finite(column: str, value: object, unit: str) -> float:
    """A time as a number, checked against the range where times are exact."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(column, value, "not a number", f"Write {unit} since the start.")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRowError(column, value, "not a finite number", f"Write {unit} since the start.")
    if value < 0:
        raise BadRowError(column, value, "negative time", f"Write {unit} since the start, >= 0.")
    return min(value, 1e300)


def in_range(column: str, value: object, seconds: Seconds) -> Seconds:
    if seconds > MAX_ARRIVAL_S:
        raise BadRowError(
            column,
            value,
            f"later than {MAX_ARRIVAL_S:.0f} s",
            "Count from the start of the trace, in its unit.",
        )
    return seconds


class BadRowError(Exception):
    """A row that cannot be used; the reader makes it an InputError or a Drop."""

    def __init__(self, column: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(problem)
        # a key or column may have any name; the message has one line
        self.column = (column if column.isprintable() else repr(column)[1:-1])[:60]
        self.value, self.problem, self.remedy = value, problem, remedy

    def error(self, where: str) -> InputError:
        return InputError(f"{where}, {self.column}", self.value, self.problem, self.remedy)


def goes_backwards(column: str, value: object) -> BadRowError:
    return BadRowError(column, value, "earlier than the row before", "Sort the file by time, or read it with sort.")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read: see ``trace.load_trace``."""

    on_bad: OnBad = "stop"
    strict_keys: bool = False
    sort: bool = False

    def __post_init__(self) -> None:
        if self.on_bad not in get_args(OnBad):
            raise UnknownNameError("on_bad", self.on_bad, get_args(OnBad))


class Rows:
    """Collects rows; ``with reader.row(n):`` turns a bad one into an error or a Drop."""

    def __init__(self, path: Path, kind: str, options: ReadOptions, unit: str = "line") -> None:
        self.path, self.kind, self.options, self.unit = path, kind, options, unit
        self.rows: list[TraceRow] = []
        self.dropped: list[Drop] = []
        self.ignored: set[str] = set()
        self.notes: list[str] = []
        self.number, self.seen, self.late = 0, 0, 0

    def row(self, number: int) -> Rows:
        self.number = number
        self.seen += 1
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, bad: BaseException | None, trace: object) -> bool:
        if not isinstance(bad, BadRowError):
            return False
        if self.options.on_bad == "stop":
            raise bad.error(f"{self.path}, {self.unit} {self.number}") from None
        self.dropped.append(Drop(self.number, bad.column, bad.value, bad.problem))
        return True

    def keep(self, row: TraceRow, time_column: str = "", time: object = None) -> None:
        last = self.rows[-1].arrival_s if self.rows else None
        if last is not None and row.arrival_s is not None and row.arrival_s < last:
            if not self.options.sort:
                raise goes_backwards(time_column, time)
            self.late += 1
        self.rows.append(row)

    def trace(self) -> Trace:
        if not self.rows:
            first = f"; the first: {self.dropped[0]}" if self.dropped else ""
            raise InputError(
                str(self.path),
                self.path.name,
                f"no usable row among {self.seen}{first}",
                "Check the file and its kind.",
            )
        if self.late:
            self.rows.sort(key=lambda row: row.arrival_s or 0.0)
            self.notes.append(f"Sorted by time: {self.late} rows were earlier than the row before.")
        return Trace(
            tuple(self.rows),
            tuple(self.dropped),
            str(self.path),
            self.kind,
            tuple(sorted(self.ignored)),
            tuple(self.notes),
        )


def read_text(path: Path) -> str:
    """The file as text. A byte-order mark, as spreadsheets write it, is skipped."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(str(path), path.name, "no such file", "Check the path.") from None
    except IsADirectoryError:
        raise InputError(str(path), path.name, "is a folder", "Name a file.") from None
    except OSError as error:
        raise InputError(str(path), path.name, f"cannot be read: {error.strerror}", "Check the file.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = data[error.start : error.start + 1]
        raise InputError(f"{path}, line {line}", found, "not UTF-8 text", "Convert the file to UTF-8.") from None
    if not text.strip():
        raise InputError(str(path), path.name, "empty file", "Give a file with at least one request.")
    return text
