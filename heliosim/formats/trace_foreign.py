"""Traces in other people's forms: CSV files of lengths, with or without times, and ShareGPT conversations."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from heliosim.errors import InputError
from heliosim.formats.trace_rows import (
    MAX_ARRIVAL_S,
    BadRowError,
    ReadOptions,
    Rows,
    Trace,
    TraceRow,
    as_finite,
    as_identity,
    as_text,
    as_tokens,
    in_range,
)
from heliosim.types import TICK, Seconds, tick

Tokenize = Callable[[str], Sequence[int]]


def plain_name(name: str) -> str:
    """A column name without case and punctuation: ``Request tokens`` and ``request_tokens`` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


PROMPT_COLUMNS: tuple[str, ...] = (
    "input_length",
    "input_len",
    "input_tokens",
    "input_toks",
    "prompt_length",
    "prompt_len",
    "prompt_tokens",
    "prompt_toks",
    "num_prefill_tokens",
    "prefill_tokens",
    "context_tokens",
    "request_tokens",
)
OUTPUT_COLUMNS: tuple[str, ...] = (
    "output_length",
    "output_len",
    "output_tokens",
    "output_toks",
    "completion_length",
    "completion_tokens",
    "generated_tokens",
    "num_decode_tokens",
    "decode_tokens",
    "response_length",
    "response_tokens",
)
"""Names of length columns, read without case and punctuation (so ContextTokens is one of them)."""

TIME_COLUMNS: dict[str, Literal["s", "ns"]] = {
    "arrived_at": "s",
    "arrival_s": "s",
    "arrival_time_s": "s",
    "arrival_ns": "ns",
    "arrival_time_ns": "ns",
    "StartTimeOffset": "ns",
}
"""Columns of arrival times in a file of lengths, with their unit; names without a unit are not read."""

_LENGTHS_IN = {plain_name(name): name for name in PROMPT_COLUMNS}
_LENGTHS_OUT = {plain_name(name): name for name in OUTPUT_COLUMNS}
_TIMES = {plain_name(name): unit for name, unit in TIME_COLUMNS.items()}


def has_length_columns(plain_names: set[str]) -> bool:
    """Whether names (from ``plain_name``) are those of prompt and output lengths."""
    return bool(plain_names & _LENGTHS_IN.keys() and plain_names & _LENGTHS_OUT.keys())


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a CSV file has what: index and name as written."""

    prompt: tuple[int, str]
    output: tuple[int, str]
    time: tuple[int, str] | None
    unit: str = ""


def load_csv(path: Path, text: str, options: ReadOptions, kind: str) -> Trace:
    reader = Rows(path, kind, options)
    lines = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    header = _csv_header(path, lines)
    columns = _azure_columns(path, header) if kind == "azure" else _length_columns(path, header)
    used = {columns.prompt[0], columns.output[0], *([columns.time[0]] if columns.time else [])}
    reader.ignored = {name for index, name in enumerate(header) if index not in used}
    clock = _Clock(columns)
    for number, fields in _csv_rows(path, lines):
        with reader.row(number):
            _check_width(fields, header)
            row = TraceRow(
                arrival_s=clock.read(fields),
                prompt_tokens=_field_tokens(fields, columns.prompt),
                output_tokens=_field_tokens(fields, columns.output),
            )
            reader.keep(row, *((columns.time[1], fields[columns.time[0]]) if columns.time else ()))
    if columns.time is None:
        reader.notes.append("The file has no arrival times; an arrival process must give them.")
    trace = reader.trace()
    # dates count from the first row kept; after sorting, that need not be the first of the file
    first = trace.rows[0].arrival_s
    if columns.unit == "date" and first:
        trace = replace(trace, rows=tuple(replace(r, arrival_s=(r.arrival_s or 0.0) - first) for r in trace.rows))
    return trace


def _csv_header(path: Path, lines: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(lines)]
    except csv.Error as error:
        raise InputError(f"{path}, line 1", path.name, f"not valid CSV: {error}", "Repair the line.") from None
    plain = [plain_name(name) for name in header]
    for name, short in zip(header, plain, strict=True):
        if short and plain.count(short) > 1:
            raise InputError(f"{path}, line 1", name, "column stands twice in the header", "Rename one of them.")
    return header


def _csv_rows(path: Path, lines: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line they end on. A broken quote spoils the rest of the file: always an error."""
    while True:
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{path}, line {lines.line_num}"
            raise InputError(where, path.name, f"not valid CSV: {error}", "Repair the line.") from None
        yield lines.line_num, fields


def _azure_columns(path: Path, header: list[str]) -> _Columns:
    found = {plain_name(name): (index, name) for index, name in enumerate(header)}
    for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens"):
        if plain_name(name) not in found:
            raise InputError(f"{path}, line 1", ",".join(header), f"column {name} missing", "Pass another kind.")
    return _Columns(found["contexttokens"], found["generatedtokens"], found["timestamp"], "date")


def _length_columns(path: Path, header: list[str]) -> _Columns:
    found = [(index, name, plain_name(name)) for index, name in enumerate(header)]

    def one(what: str, names: Mapping[str, str]) -> tuple[int, str]:
        hits = [(index, name) for index, name, plain in found if plain in names]
        if len(hits) == 1:
            return hits[0]
        if not hits:
            remedy = f"Rename one to {next(iter(names.values()))}."
            raise InputError(f"{path}, line 1", ",".join(header), f"no column of {what} lengths", remedy)
        remedy = "Rename all but one."
        raise InputError(f"{path}, line 1", [name for _, name in hits], f"several columns of {what} lengths", remedy)

    times = [(index, name) for index, name, plain in found if plain in _TIMES]
    if len(times) > 1:
        raise InputError(f"{path}, line 1", [n for _, n in times], "several columns of times", "Rename all but one.")
    time = times[0] if times else None
    unit = _TIMES[plain_name(time[1])] if time else ""
    return _Columns(one("prompt", _LENGTHS_IN), one("output", _LENGTHS_OUT), time, unit)


def _check_width(fields: list[str], header: list[str]) -> None:
    if not fields:
        raise BadRowError("line", "", "empty line", "Remove it.")
    if len(fields) < len(header):
        raise BadRowError(header[len(fields)], None, "missing value", f"Write {len(header)} values.")
    if len(fields) > len(header):
        extra = fields[len(header)]
        raise BadRowError("line", extra, f"more values than the {len(header)} columns", "Remove them.")


def _field_tokens(fields: list[str], column: tuple[int, str]) -> int:
    index, name = column
    text = fields[index].strip()
    if text == "":
        raise BadRowError(name, text, "missing value", "Write an integer >= 1.")
    if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
        raise BadRowError(name, text, "not a whole number of tokens", "Write an integer >= 1.")
    return as_tokens(name, int(text))


def _from_nanoseconds(nanoseconds: int) -> Seconds:
    """Nearest tick, in integers."""
    return (nanoseconds * round(1 / TICK) + 500_000_000) // 1_000_000_000 * TICK


_DATE = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?", flags=re.ASCII)


class _Clock:
    """Reads the time column of a CSV file as seconds; dates count from the first row that has one."""

    def __init__(self, columns: _Columns) -> None:
        self.columns = columns
        self.start: datetime | None = None

    def read(self, fields: list[str]) -> Seconds | None:
        if self.columns.time is None:
            return None
        index, name = self.columns.time
        text = fields[index].strip()
        if text == "":
            raise BadRowError(name, text, "missing value", "Write a time.")
        if self.columns.unit == "date":
            return self._date(name, text)
        if self.columns.unit == "ns":
            if not re.fullmatch(r"[+-]?[0-9]{1,30}", text):
                raise BadRowError(name, text, "not a whole number of nanoseconds", "Write an integer >= 0.")
            number = int(text)
            as_finite(name, number, "nanoseconds")
            return in_range(name, text, _from_nanoseconds(number))
        try:
            seconds = float(text)
        except ValueError:
            raise BadRowError(name, text, "not a number of seconds", "Write a number >= 0.") from None
        return tick(in_range(name, text, as_finite(name, seconds, "seconds")))

    def _date(self, name: str, text: str) -> Seconds:
        match = _DATE.fullmatch(text)
        remedy = "Write it as 2023-11-16 18:15:46.680590, with or without a zone, the same in all rows."
        if match is None:
            raise BadRowError(name, text, "not a date and time", remedy)
        day, clock, fraction, zone = match.groups()
        try:
            moment = datetime.fromisoformat(f"{day} {clock}{(zone or '').replace('Z', '+00:00')}")
        except ValueError as error:
            raise BadRowError(name, text, f"not a date and time ({error})", remedy) from None
        if self.start is None:
            self.start = moment
        if (self.start.tzinfo is None) != (moment.tzinfo is None):
            raise BadRowError(name, text, "rows with and without a time zone", remedy)
        apart = moment - self.start
        whole = apart.days * 86_400 + apart.seconds
        seconds = _from_nanoseconds(whole * 1_000_000_000 + int((fraction or "0").ljust(9, "0")))
        if abs(seconds) > MAX_ARRIVAL_S:
            problem = f"more than {MAX_ARRIVAL_S:.0f} s away from the first row"
            raise BadRowError(name, text, problem, "Cut the file into shorter ones.")
        return seconds


# --- ShareGPT -----------------------------------------------------------------------------------------------

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


@dataclass(frozen=True, slots=True)
class TextMeasure:
    """How long a text is, in tokens."""

    tokenize: Tokenize | None
    chars_per_token: float | None
    keep_ids: bool

    @classmethod
    def of(cls, tokenize: Tokenize | None, chars_per_token: float | None, keep_ids: bool) -> TextMeasure:
        if (tokenize is None) == (chars_per_token is None):
            raise InputError(
                "kind sharegpt",
                chars_per_token,
                "text needs a tokenizer or chars_per_token, and not both",
                "Pass a tokenizer, or chars_per_token 4 as a rough estimate for English.",
            )
        if chars_per_token is not None and not 0 < chars_per_token < math.inf:
            raise InputError("chars_per_token", chars_per_token, "not a number > 0", "Pass a number such as 4.")
        if keep_ids and tokenize is None:
            raise InputError("keep_ids", keep_ids, "an estimate has no ids", "Pass a tokenizer or leave it out.")
        return cls(tokenize, chars_per_token, keep_ids)

    def prompt(self, column: str, text: str) -> tuple[int, tuple[int, ...] | None]:
        """Tokens of a prompt, special ones included, and their ids if they are to be kept."""
        if self.tokenize is None:
            return self._estimate(column, text), None
        ids = tuple(int(i) for i in self.tokenize(_not_empty(column, text)))
        return as_tokens(column, len(ids)), ids if self.keep_ids else None

    def answer(self, column: str, text: str) -> int:
        """Tokens of an answer, without the special ones that every text gets."""
        if self.tokenize is None:
            return self._estimate(column, text)
        return as_tokens(column, len(self.tokenize(_not_empty(column, text))) - len(self.tokenize("")))

    def _estimate(self, column: str, text: str) -> int:
        assert self.chars_per_token is not None
        return max(1, round(len(_not_empty(column, text)) / self.chars_per_token))


def _not_empty(column: str, text: str) -> str:
    if not text.strip():
        raise BadRowError(column, text, "empty text", "Leave the conversation out.")
    return text


def load_sharegpt(path: Path, text: str, options: ReadOptions, measure: TextMeasure) -> Trace:
    reader = Rows(path, "sharegpt", options, unit="entry")
    later = 0
    for number, entry in enumerate(_parse_list(path, text), 1):
        with reader.row(number):
            row, unused = _conversation(entry, measure, reader.ignored)
            reader.keep(row)
            later += unused
    if later:
        reader.notes.append(f"Only the first question with an answer is used; {later} other turns were left out.")
    if measure.chars_per_token is not None:
        reader.notes.append(f"Lengths are estimated at {measure.chars_per_token:g} characters per token.")
    reader.notes.append("The file has no arrival times; an arrival process must give them.")
    return reader.trace()


def _parse_list(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise InputError(where, path.name, f"not valid JSON ({error.msg})", "Restore the file.") from None
    except (RecursionError, ValueError):  # Python refuses to read integers of thousands of digits
        problem = "nested too deeply, or a number of too many digits"
        raise InputError(str(path), path.name, problem, "Restore the file.") from None
    if not isinstance(value, list):
        problem = f"not a JSON list but {type(value).__name__}"
        raise InputError(str(path), path.name, problem, "Give a list of conversations, or pass another kind.")
    return value


def _conversation(entry: Any, measure: TextMeasure, ignored: set[str]) -> tuple[TraceRow, int]:
    """The first question with an answer, and how many other turns there are."""
    if not isinstance(entry, dict):
        raise BadRowError("entry", entry, "not a JSON object", "Write {id, conversations}.")
    turns = entry.get("conversations")
    if not isinstance(turns, list):
        raise BadRowError("conversations", turns, "not a list of turns", "Write a list of {from, value}.")
    for turn in turns:
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise BadRowError("conversations", turn, "a turn without from and value", "Write {from, value}.")
    for ask, answer in pairwise(turns):
        if ask["from"] in _ASKS and answer["from"] in _ANSWERS:
            break
    else:
        raise BadRowError(
            "conversations",
            [turn["from"] for turn in turns],
            "no question with an answer",
            "Leave the entry out.",
        )
    prompt, ids = measure.prompt("conversations.value", as_text("conversations.value", ask["value"]))
    output = measure.answer("conversations.value", as_text("conversations.value", answer["value"]))
    row = TraceRow(None, prompt, output, prompt_ids=ids, id=as_identity("id", entry.get("id")))
    ignored.update(key for key in entry if key not in ("id", "conversations"))
    return row, len(turns) - 2
