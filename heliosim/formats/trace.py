"""Traces: who asks when, for how much. Our native form is Mooncake's with optional keys; others are imported.

Native form: JSON Lines, one request per line, in order of time.

- ``timestamp``: arrival in **milliseconds** since the start of the trace, whole or not
- ``input_length``: prompt tokens, >= 1
- ``output_length``: generated tokens, >= 1; ``null`` where nobody knows (then ``max_tokens`` must be there)
- ``max_tokens``: optional, what the client allowed, >= output_length
- ``task``: optional, name of the task family
- ``prompt_ids``: optional, the prompt's vocabulary ids, input_length of them
- ``hash_ids``: optional, ids of the prompt's prefix blocks (Mooncake: 512 tokens each), kept as they are
- ``id``: optional, text or an integer, kept as it is
- ``priority``: optional, the request's class, 0 the most urgent

Nothing is lost silently: a bad row stops the reading or is counted with its row, column, value and reason; keys
and columns nobody reads are listed in ``Trace.ignored_keys``. Arrivals become multiples of ``types.TICK`` on
reading. A trace does not know who sent a request, nor which requests belong to one conversation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import write_text
from heliosim.formats.trace_foreign import (
    OUTPUT_COLUMNS,
    PROMPT_COLUMNS,
    TIME_COLUMNS,
    TextMeasure,
    Tokenize,
    has_length_columns,
    load_csv,
    load_sharegpt,
    plain_name,
)
from heliosim.formats.trace_rows import (
    MAX_ARRIVAL_S,
    BadRowError,
    Drop,
    OnBad,
    ReadOptions,
    Rows,
    Trace,
    TraceRow,
    as_class,
    as_finite,
    as_identity,
    as_ids,
    as_optional_tokens,
    as_text,
    as_tokens,
    goes_backwards,
    in_range,
    read_text,
)
from heliosim.types import Seconds, tick

__all__ = [
    "MAX_ARRIVAL_S",
    "OUTPUT_COLUMNS",
    "PROMPT_COLUMNS",
    "TIME_COLUMNS",
    "Drop",
    "Kind",
    "LengthStats",
    "OnBad",
    "Tokenize",
    "Trace",
    "TraceRow",
    "TraceStats",
    "import_trace",
    "load_trace",
    "save_trace",
    "spread_steps",
    "trace_stats",
]

Kind = Literal["auto", "mooncake", "azure", "sharegpt", "lengths"]

_FIXED_KEYS = ("timestamp", "input_length", "output_length")
_KNOWN_KEYS = (*_FIXED_KEYS, "max_tokens", "task", "prompt_ids", "hash_ids", "id", "priority")


# --- native form --------------------------------------------------------------------------------------------


def load_trace(path: Path | str, *, on_bad: OnBad = "stop", strict_keys: bool = False, sort: bool = False) -> Trace:
    """Read a native (or Mooncake) trace.

    ``on_bad``: ``stop`` raises InputError at the first bad row, ``drop`` leaves it out and counts it.
    ``strict_keys``: an unknown key makes a row bad; otherwise it is listed in ``ignored_keys``.
    ``sort``: put rows in order of time; otherwise a row earlier than the one before it is bad.
    """
    return _load_native(Path(path), read_text(Path(path)), ReadOptions(on_bad, strict_keys, sort))


def save_trace(rows: Iterable[TraceRow], path: Path | str) -> None:
    """Write a native trace, whole or not at all. Rows must have times, in order (else InputError)."""
    path = Path(path)
    lines = []
    before: Seconds | None = None
    for number, row in enumerate(rows, 1):
        try:
            record = _as_record(row)
            # what is written must be readable, as the same row
            read, _ = _native_row(record, strict_keys=True)
            if before is not None and read.arrival_s is not None and read.arrival_s < before:
                raise goes_backwards("timestamp", record["timestamp"])
        except BadRowError as bad:
            raise bad.error(f"{path}, row {number}") from None
        before = read.arrival_s
        lines.append(json.dumps(record, allow_nan=False, ensure_ascii=False))
    if not lines:
        raise InputError(str(path), 0, "a trace needs at least one row", "Pass at least one request.")
    if path.is_dir():
        raise InputError(str(path), path.name, "is a folder", "Name a file.")
    try:
        write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise InputError(
            str(path), path.name, f"cannot be written: {error.strerror}", "Choose another place."
        ) from None


def _as_record(row: TraceRow) -> dict[str, Any]:
    if row.arrival_s is None:
        raise BadRowError("timestamp", None, "the row has no arrival time", "Give it one with an arrival process.")
    record: dict[str, Any] = {
        "timestamp": _milliseconds(row.arrival_s),
        "input_length": row.prompt_tokens,
        "output_length": row.output_tokens,
    }
    if row.max_tokens is not None:
        record["max_tokens"] = row.max_tokens
    if row.task != "":
        record["task"] = row.task
    if row.prompt_ids is not None:
        record["prompt_ids"] = list(row.prompt_ids)
    if row.hash_ids is not None:
        record["hash_ids"] = list(row.hash_ids)
    if row.id is not None:
        record["id"] = row.id
    if row.priority is not None:
        record["priority"] = row.priority
    return record


def _from_milliseconds(value: object) -> Seconds:
    return in_range("timestamp", value, _seconds(as_finite("timestamp", value, "milliseconds")))


def _seconds(milliseconds: float) -> Seconds:
    """Nearest tick. The remainder is exact, so a saved time comes back as it was even after weeks."""
    whole, rest = divmod(milliseconds, 1000)
    return float(whole) + tick(rest / 1000)


def _milliseconds(seconds: Seconds) -> float | int:
    if not math.isfinite(seconds):
        raise BadRowError("timestamp", seconds, "not a finite number", "Give a finite arrival time.")
    whole = math.floor(seconds)
    exact = whole * 1000 + (seconds - whole) * 1000
    # the shortest number that is read back as the same time
    for digits in (0, 3, 6, 7):
        short = round(exact, digits)
        if _seconds(short) == seconds:
            return int(short) if digits == 0 else short
    return exact


def _load_native(path: Path, text: str, options: ReadOptions) -> Trace:
    reader = Rows(path, "mooncake", options)
    for number, line in _lines(text):
        with reader.row(number):
            record = _parse_object(line)
            row, unknown = _native_row(record, strict_keys=options.strict_keys)
            reader.keep(row, "timestamp", record["timestamp"])
            reader.ignored.update(unknown)
    return reader.trace()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines from 1; split at newlines only, since JSON text may hold other separators."""
    lines = text.rstrip("\r\n \t").split("\n")
    return ((number, line.rstrip("\r")) for number, line in enumerate(lines, 1))


def _parse_object(line: str) -> dict[str, Any]:
    if not line.strip():
        raise BadRowError("line", line, "empty line", "Remove it.")
    try:
        value = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise BadRowError("line", line, f"not valid JSON ({error.msg})", "Write one JSON object per line.") from None
    except RecursionError:
        raise BadRowError("line", line, "JSON nested too deeply", "Write one flat object per line.") from None
    except ValueError:  # Python refuses to read integers of thousands of digits
        raise BadRowError("line", line, "a number of too many digits", "Write one JSON object per line.") from None
    if not isinstance(value, dict):
        raise BadRowError("line", value, "not a JSON object", "Write one JSON object per line.")
    return value


def _refuse_constant(name: str) -> object:
    raise BadRowError("line", name, "not a finite number", "Write a finite number.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRowError(twice, twice, "key stands twice in one object", "Keep one of them.")
    return record


def _native_row(record: Mapping[str, Any], *, strict_keys: bool) -> tuple[TraceRow, set[str]]:
    """A checked row and the keys nobody reads."""
    unknown = record.keys() - set(_KNOWN_KEYS)
    if unknown and strict_keys:
        name = min(unknown)
        raise BadRowError(name, record[name], "unknown key", f"Remove it; known: {', '.join(_KNOWN_KEYS)}.")
    for name in _FIXED_KEYS:
        if name not in record:
            raise BadRowError(name, None, "missing key", "Add it.")
    row = TraceRow(
        arrival_s=_from_milliseconds(record["timestamp"]),
        prompt_tokens=as_tokens("input_length", record["input_length"]),
        output_tokens=as_optional_tokens("output_length", record["output_length"]),
        max_tokens=as_optional_tokens("max_tokens", record.get("max_tokens")),
        task=as_text("task", record.get("task", "")),
        prompt_ids=as_ids("prompt_ids", record.get("prompt_ids")),
        hash_ids=as_ids("hash_ids", record.get("hash_ids")),
        id=as_identity("id", record.get("id")),
        priority=as_class("priority", record.get("priority")),
    )
    _check_together(row)
    return row, unknown


def _check_together(row: TraceRow) -> None:
    if row.prompt_ids is not None and len(row.prompt_ids) != row.prompt_tokens:
        raise BadRowError(
            "prompt_ids",
            len(row.prompt_ids),
            f"number of ids differs from input_length {row.prompt_tokens}",
            "Correct input_length or prompt_ids.",
        )
    if row.output_tokens is None and row.max_tokens is None:
        raise BadRowError("output_length", None, "unknown without max_tokens", "Add output_length or max_tokens.")
    if row.output_tokens is not None and row.max_tokens is not None and row.max_tokens < row.output_tokens:
        raise BadRowError(
            "max_tokens",
            row.max_tokens,
            f"less than output_length {row.output_tokens}",
            "Correct one of them.",
        )


# --- other people's forms -----------------------------------------------------------------------------------


def import_trace(
    path: Path | str,
    kind: Kind = "auto",
    *,
    on_bad: OnBad = "stop",
    strict_keys: bool = False,
    sort: bool = False,
    spread: bool = False,
    tokenize: Tokenize | None = None,
    chars_per_token: float | None = None,
    keep_ids: bool = False,
) -> Trace:
    """Read a trace of any known kind; ``notes`` says what was seen and assumed.

    ``mooncake``: JSON Lines, also our native form. ``azure``: AzureLLMInferenceTrace CSV of 2023 or 2024
    (TIMESTAMP, ContextTokens, GeneratedTokens); arrivals count from the first row. ``lengths``: CSV with a column
    of prompt and one of output lengths under a common name (``PROMPT_COLUMNS``, ``OUTPUT_COLUMNS``), and times if
    it has a column of ``TIME_COLUMNS``. ``sharegpt``: JSON list of {id, conversations: [{from, value}]}; the first
    question with an answer of each entry is a request, without a time. Its lengths come from ``tokenize`` (text
    -> ids; ``keep_ids`` keeps the prompt's) or are estimated as characters / ``chars_per_token`` (English text in
    common vocabularies: about 4).

    ``spread``: requests with equal times are spread evenly up to the next time (see ``spread_steps``). The other
    options are those of ``load_trace``.
    """
    path = Path(path)
    options = ReadOptions(on_bad, strict_keys, sort)
    if kind not in get_args(Kind):
        raise UnknownNameError("trace kind", kind, get_args(Kind))
    text = read_text(path)
    seen, because = _detect(path, text) if kind == "auto" else (kind, "")
    conversion = tokenize is not None or chars_per_token is not None or keep_ids
    if conversion and seen != "sharegpt":
        raise InputError(str(path), seen, "tokenizer and chars_per_token are for kind sharegpt only", "Leave them out.")
    if strict_keys and seen != "mooncake":
        raise InputError(str(path), seen, "strict_keys is for kind mooncake only", "Leave it out.")
    if seen == "mooncake":
        trace = _load_native(path, text, options)
    elif seen == "sharegpt":
        trace = load_sharegpt(path, text, options, TextMeasure.of(tokenize, chars_per_token, keep_ids))
    else:
        trace = load_csv(path, text, options, seen)
    if (sort or spread) and not trace.has_times:
        raise InputError(str(path), seen, "has no arrival times to sort or spread", "Leave sort and spread out.")
    if because:
        trace = replace(trace, notes=(f"Read as {seen}: {because}.", *trace.notes))
    return _spread_trace(trace) if spread else trace


def _detect(path: Path, text: str) -> tuple[str, str]:
    """The kind of a file and what gave it away."""
    start = text.lstrip()
    if start.startswith("{"):
        return "mooncake", "lines are JSON objects"
    if start.startswith("["):
        return "sharegpt", "the file is a JSON list"
    header = text.split("\n", 1)[0].rstrip("\r")
    names = {plain_name(name) for name in header.split(",")}
    if {"timestamp", "contexttokens", "generatedtokens"} <= names:
        return "azure", f"the header is {header}"
    if has_length_columns(names):
        return "lengths", f"the header is {header}"
    raise InputError(
        str(path),
        header,
        "kind not recognised: neither JSON nor a CSV header with known columns",
        f"Rename the columns (input_length, output_length) or pass a kind: {', '.join(get_args(Kind)[1:])}.",
    )


# --- what can be done with a trace --------------------------------------------------------------------------


def spread_steps(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Spread requests that share an arrival time evenly up to the next arrival time.

    Some traces (Mooncake) log times in coarse steps, which makes the arrivals look far burstier than they were.
    The last group takes the width of the step before it. Rows must be timed and in order.
    """
    starts: list[int] = []
    for index, row in enumerate(rows):
        if row.arrival_s is None:
            raise InputError(f"row {index + 1}, timestamp", None, "no arrival time to spread", "Leave spread out.")
        if not starts or row.arrival_s != rows[starts[-1]].arrival_s:
            starts.append(index)
    times = [rows[start].arrival_s or 0.0 for start in starts]
    if len(times) < 2:
        return list(rows)
    widths = [after - before for before, after in pairwise(times)]
    spread = []
    for start, stop, time, width in zip(starts, [*starts[1:], len(rows)], times, [*widths, widths[-1]], strict=True):
        count = stop - start
        spread += [replace(rows[start + i], arrival_s=tick(time + width * i / count)) for i in range(count)]
    return spread


def _spread_trace(trace: Trace) -> Trace:
    rows = tuple(spread_steps(trace.rows))
    moved = sum(old != new for old, new in zip(trace.rows, rows, strict=True))
    note = f"Spread evenly: {moved} rows shared their arrival time with the row before."
    return replace(trace, rows=rows, notes=(*trace.notes, note))


@dataclass(frozen=True, slots=True)
class LengthStats:
    """A column of lengths in tokens: mean and percentiles."""

    mean: float
    p50: float
    p90: float
    p99: float
    largest: int


@dataclass(frozen=True, slots=True)
class TraceStats:
    """``duration_s``: first to last arrival; ``rate_per_s``: arrivals after the first, per second of it.

    ``gap_cv``: standard deviation of the times between arrivals over their mean (1 for a Poisson process);
    ``ties``: rows that share their arrival time with the row before. None without times or with too few rows.
    """

    requests: int
    dropped: int
    duration_s: Seconds | None
    rate_per_s: float | None
    gap_cv: float | None
    ties: int | None
    prompt_tokens: LengthStats
    output_tokens: LengthStats | None
    tasks: dict[str, int]
    with_prompt_ids: int
    with_max_tokens: int


def trace_stats(trace: Trace) -> TraceStats:
    """Counts, rate and lengths of a trace."""
    import numpy as np

    def lengths(values: list[int]) -> LengthStats | None:
        if not values:
            return None
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return LengthStats(float(np.mean(values)), p50, p90, p99, max(values))

    duration = rate = cv = ties = None
    if trace.has_times:
        arrivals = np.array([row.arrival_s for row in trace.rows], dtype=float)
        gaps = np.diff(arrivals)
        duration = float(arrivals[-1] - arrivals[0])
        ties = int(np.sum(gaps == 0))
        if duration > 0:
            rate = len(gaps) / duration
            cv = float(np.std(gaps) / np.mean(gaps)) if len(gaps) > 1 else None
    tasks: dict[str, int] = {}
    for row in trace.rows:
        tasks[row.task] = tasks.get(row.task, 0) + 1
    prompts = lengths([row.prompt_tokens for row in trace.rows])
    assert prompts is not None
    return TraceStats(
        requests=trace.kept,
        dropped=len(trace.dropped),
        duration_s=duration,
        rate_per_s=rate,
        gap_cv=cv,
        ties=ties,
        prompt_tokens=prompts,
        output_tokens=lengths([row.output_tokens for row in trace.rows if row.output_tokens is not None]),
        tasks=tasks,
        with_prompt_ids=sum(row.prompt_ids is not None for row in trace.rows),
        with_max_tokens=sum(row.max_tokens is not None for row in trace.rows),
    )
