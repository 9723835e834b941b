import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliosim.errors import HelioSimError, InputError, UnknownNameError
from heliosim.formats.trace import (
    MAX_ARRIVAL_S,
    Drop,
    Trace,
    TraceRow,
    import_trace,
    load_trace,
    save_trace,
    spread_steps,
    trace_stats,
)
from heliosim.types import TICK, tick

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data is not here")


def good(**changes: Any) -> dict[str, Any]:
    return {"timestamp": 1500, "input_length": 3, "output_length": 2, **changes}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in good().items() if k != key}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def one_line(error: BaseException) -> str:
    assert isinstance(error, HelioSimError)
    assert "\n" not in str(error)
    return str(error)


def complaint_about(read: Callable[[Path], Trace], path: Path) -> str | None:
    """What is wrong with a file, in one line; None if nothing is. Anything but an InputError goes through."""
    try:
        read(path)
    except InputError as error:
        return one_line(error)
    return None


# --- native form --------------------------------------------------------------------------------------------


def test_every_key_is_read(tmp_path: Path) -> None:
    full = good(max_tokens=9, task="code", prompt_ids=[5, 6, 7], hash_ids=[0, 1], id="a")
    trace = load_trace(write(tmp_path / "t.jsonl", good(timestamp=0.5), full))
    assert trace.rows == (TraceRow(tick(0.0005), 3, 2), TraceRow(1.5, 3, 2, 9, "code", (5, 6, 7), (0, 1), "a"))
    assert (trace.kept, trace.dropped, trace.ignored_keys, trace.has_times) == (2, (), (), True)
    assert trace.source.endswith("t.jsonl")


def test_null_stands_for_a_missing_optional_key(tmp_path: Path) -> None:
    row = good(output_length=None, max_tokens=4, prompt_ids=None, hash_ids=None, id=None)
    assert load_trace(write(tmp_path / "t.jsonl", row)).rows == (TraceRow(1.5, 3, None, 4),)


ids = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)


@st.composite
def rows(draw: st.DrawFn) -> list[TraceRow]:
    last = int(MAX_ARRIVAL_S / TICK)
    ticks = sorted(draw(st.lists(st.one_of(st.integers(0, 2**34), st.integers(0, last)), min_size=1, max_size=8)))
    made = []
    for t in ticks:
        prompt_ids = draw(st.none() | ids.filter(len))
        output = draw(st.none() | st.integers(1, 5000))
        limit = draw((st.none() if output else st.nothing()) | st.integers(output or 1, 9000))
        made.append(
            TraceRow(
                arrival_s=t * TICK,
                prompt_tokens=len(prompt_ids) if prompt_ids else draw(st.integers(1, 200_000)),
                output_tokens=output,
                max_tokens=limit,
                task=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=6)),
                prompt_ids=prompt_ids,
                hash_ids=draw(st.none() | ids),
                id=draw(st.none() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)),
            )
        )
    return made


@settings(max_examples=60, deadline=None)
@given(rows())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, made: list[TraceRow]) -> None:
    path = tmp_path_factory.mktemp("round") / "t.jsonl"
    save_trace(made, path)
    assert load_trace(path, strict_keys=True).rows == tuple(made)
    again = path.with_name("again.jsonl")
    save_trace(load_trace(path).rows, again)
    assert again.read_bytes() == path.read_bytes()


def test_whole_milliseconds_are_written_as_mooncake_does(tmp_path: Path) -> None:
    save_trace([TraceRow(0.0, 1, 1), TraceRow(1.5, 1, 1), TraceRow(tick(1.5000001), 1, 1)], tmp_path / "t.jsonl")
    stamps = [json.loads(line)["timestamp"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert stamps == [0, 1500, 1500.0001]
    assert isinstance(stamps[1], int)


def test_any_name_of_a_key_gives_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", good(**{"a\nb" + "c" * 200: 1}))
    with pytest.raises(InputError) as caught:
        load_trace(path, strict_keys=True)
    assert r"line 1, a\nbccc" in one_line(caught.value)
    assert len(str(caught.value)) < 400


# what stands in the file, the column and the value to be named, a part of the reason
BROKEN = [
    ("", "line", "", "empty line"),
    ("{oops", "line", "{oops", "not valid JSON"),
    ("[1]", "line", [1], "not a JSON object"),
    ("[" * 100_000, "line", None, "JSON"),
    ('{"timestamp": NaN}', "line", "NaN", "not a finite number"),
    ('{"timestamp": 1, "timestamp": 2}', "timestamp", "timestamp", "twice"),
    ('{"timestamp": ' + "9" * 5000 + "}", "line", None, "too many digits"),
    (without("timestamp"), "timestamp", None, "missing key"),
    (without("input_length"), "input_length", None, "missing key"),
    (without("output_length"), "output_length", None, "missing key"),
    (good(timestamp=-1), "timestamp", -1, "negative time"),
    (good(timestamp="0"), "timestamp", "0", "not a number"),
    (good(timestamp=True), "timestamp", True, "not a number"),
    (good(timestamp=None), "timestamp", None, "not a number"),
    ('{"timestamp": 1e999, "input_length": 3, "output_length": 2}', "timestamp", float("inf"), "not a finite number"),
    (good(timestamp=1_700_000_000_000), "timestamp", 1_700_000_000_000, "later than"),
    (good(input_length=0), "input_length", 0, "zero length"),
    (good(input_length=-4), "input_length", -4, "negative length"),
    (good(input_length=3.0), "input_length", 3.0, "not a whole number"),
    (good(input_length="3"), "input_length", "3", "not a whole number"),
    (good(input_length=None), "input_length", None, "not a whole number"),
    (good(input_length=2**40), "input_length", 2**40, "more than"),
    (good(output_length=0), "output_length", 0, "zero length"),
    (good(output_length=2.5), "output_length", 2.5, "not a whole number"),
    (good(output_length=None), "output_length", None, "unknown without max_tokens"),
    (good(max_tokens=1), "max_tokens", 1, "less than output_length 2"),
    (good(max_tokens=0), "max_tokens", 0, "zero length"),
    (good(task=3), "task", 3, "not a text"),
    (good(task="\ud800"), "task", "\ud800", "surrogate"),
    (good(prompt_ids=[1, 2]), "prompt_ids", 2, "differs from input_length 3"),
    (good(prompt_ids=[1, 2, -3]), "prompt_ids", -3, "not an integer >= 0"),
    (good(prompt_ids="abc"), "prompt_ids", "abc", "not a list"),
    (good(hash_ids=[1.5]), "hash_ids", 1.5, "not an integer >= 0"),
    (good(id=[1]), "id", [1], "neither a text nor an integer"),
    (good(timestamp=999), "timestamp", 999, "earlier than the row before"),
]


@pytest.mark.parametrize(("line", "column", "value", "reason"), BROKEN)
def test_bad_row_is_named_or_dropped(tmp_path: Path, line: object, column: str, value: object, reason: str) -> None:
    path = write(tmp_path / "t.jsonl", good(timestamp=1000), line, good(timestamp=2000))
    with pytest.raises(InputError, match="line 2") as caught:
        load_trace(path)
    text = one_line(caught.value)
    assert f"line 2, {column}: " in text
    assert reason in text
    trace = load_trace(path, on_bad="drop")
    (drop,) = trace.dropped
    assert (trace.kept, drop.row, drop.column) == (2, 2, column)
    assert reason in drop.reason
    if value is not None:
        assert drop.value == value
    assert "row 2" in str(drop)
    assert len(str(drop)) < 200


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_give_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(data)
    for read in (load_trace, import_trace):
        complaint_about(read, path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {k: json_values for k in good()}, optional={k: json_values for k in ("task", "id", "hash_ids")}
    )
)
def test_any_row_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    path = write(tmp_path_factory.mktemp("row") / "t.jsonl", row)
    complaint = complaint_about(load_trace, path)
    assert complaint is None or "line 1, " in complaint


def test_unknown_keys_are_listed_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", good(), good(colour="red", speed=3))
    assert load_trace(path).ignored_keys == ("colour", "speed")
    with pytest.raises(InputError, match=r"line 2, colour: unknown key \(value: 'red'\)"):
        load_trace(path, strict_keys=True)


def test_sort_is_asked_for(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl", good(timestamp=3000, id=1), good(timestamp=1000, id=2), good(timestamp=3000, id=3)
    )
    with pytest.raises(InputError, match="line 2, timestamp: earlier than the row before"):
        load_trace(path)
    trace = load_trace(path, sort=True)
    assert [row.id for row in trace.rows] == [2, 1, 3]
    assert trace.notes == ("Sorted by time: 1 rows were earlier than the row before.",)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_trace(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        load_trace(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="empty file"):
        load_trace(tmp_path / "empty.jsonl", on_bad="drop")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(good()).encode() + b'\n{"task": "\xe9"}\n')
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        load_trace(tmp_path / "latin.jsonl", on_bad="drop")
    with pytest.raises(InputError, match=r"no usable row among 2; the first: row 1, input_length: zero length"):
        load_trace(write(tmp_path / "t.jsonl", good(input_length=0), good(input_length=0)), on_bad="drop")


def test_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(good()).encode() + b"\r\n" + json.dumps(good()).encode() + b"\r\n\r\n"
    )
    assert load_trace(path).kept == 2


def test_unknown_choice_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", good())
    with pytest.raises(UnknownNameError, match=r"'dropp'.*Did you mean 'drop'"):
        load_trace(path, on_bad="dropp")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="Did you mean 'azure'"):
        import_trace(path, "azur")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ([], "at least one row"),
        ([TraceRow(None, 1, 1)], "row 1, timestamp: the row has no arrival time"),
        ([TraceRow(2.0, 1, 1), TraceRow(1.0, 1, 1)], "row 2, timestamp: earlier"),
        ([TraceRow(float("nan"), 1, 1)], "row 1, timestamp: not a finite number"),
        ([TraceRow(-1.0, 1, 1)], "row 1, timestamp: negative time"),
        ([TraceRow(1.0, 1, 1, prompt_ids=(1, 2))], "row 1, prompt_ids"),
        ([TraceRow(1.0, 0, 1)], "row 1, input_length: zero length"),
    ],
)
def test_bad_rows_are_not_saved(tmp_path: Path, bad: list[TraceRow], part: str) -> None:
    path = write(tmp_path / "t.jsonl", good())
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        save_trace(bad, path)
    assert part in one_line(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.jsonl", good())

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_trace([TraceRow(0.0, 1, 1)], path)
    assert list(tmp_path.iterdir()) == [path]
    assert load_trace(path).rows[0].prompt_tokens == 3


def test_saving_where_nothing_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        save_trace([TraceRow(0.0, 1, 1)], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_trace([TraceRow(0.0, 1, 1)], tmp_path / "file" / "t.jsonl")


# --- imports ------------------------------------------------------------------------------------------------

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_azure_of_2023_and_2024(tmp_path: Path) -> None:
    old = write(
        tmp_path / "old.csv", AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"
    )
    trace = import_trace(old)
    assert trace.kind == "azure"
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.rows] == [(374, 44), (396, 109)]
    assert [r.arrival_s for r in trace.rows] == [0.0, pytest.approx(4.314579, abs=2 * TICK)]
    assert trace.notes == (f"Read as azure: the header is {AZURE}.",)
    new = write(
        tmp_path / "new.csv", AZURE, "2024-05-10 23:59:59.009930+00:00,1,2", "2024-05-11 00:00:01+00:00,3,4", ""
    )
    assert [r.arrival_s for r in import_trace(new).rows] == [0.0, pytest.approx(1.99007, abs=2 * TICK)]


def test_dates_count_from_the_first_row_kept(tmp_path: Path) -> None:
    lines = (AZURE, "2023-11-16 18:00:10,1,1", "2023-11-16 18:00:00,2,2", "2023-11-16 18:00:30,3,3")
    path = write(tmp_path / "t.csv", *lines)
    assert [r.arrival_s for r in import_trace(path, sort=True).rows] == [0.0, 10.0, 30.0]
    path = write(tmp_path / "t.csv", AZURE, "2023-11-16 18:00:10,0,1", *lines[3:], "2023-11-16 18:00:31,3,3")
    assert [r.arrival_s for r in import_trace(path, on_bad="drop").rows] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        ("", "line", "empty line"),
        ("2023-11-16 18:15:47,374", "GeneratedTokens", "missing value"),
        ("2023-11-16 18:15:47,374,44,1", "line", "more values than the 3 columns"),
        ("2023-11-16 18:15:47,,44", "ContextTokens", "missing value"),
        ("2023-11-16 18:15:47,12.0,44", "ContextTokens", "not a whole number"),
        ("2023-11-16 18:15:47,nan,44", "ContextTokens", "not a whole number"),
        ("2023-11-16 18:15:47,374,0", "GeneratedTokens", "zero length"),
        ("2023-11-16 18:15:47,374,-44", "GeneratedTokens", "negative length"),
        ("2023-11-16,374,44", "TIMESTAMP", "not a date and time"),
        ("2023-13-16 18:15:47,374,44", "TIMESTAMP", "not a date and time"),
        ("2023-11-16 18:15:47+00:00,374,44", "TIMESTAMP", "with and without a time zone"),
        ("2023-11-16 18:15:45,374,44", "TIMESTAMP", "earlier than the row before"),
        ("2024-11-16 18:15:45,374,44", "TIMESTAMP", "away from the first row"),
        (",374,44", "TIMESTAMP", "missing value"),
    ],
)
def test_bad_csv_row_is_named_or_dropped(tmp_path: Path, line: str, column: str, reason: str) -> None:
    path = write(tmp_path / "t.csv", AZURE, "2023-11-16 18:15:46,1,1", line, "2023-11-16 18:15:48,1,1")
    with pytest.raises(InputError) as caught:
        import_trace(path)
    assert f"line 3, {column}: " in one_line(caught.value)
    assert reason in str(caught.value)
    trace = import_trace(path, on_bad="drop")
    assert trace.kept == 2
    assert [(drop.row, drop.column) for drop in trace.dropped] == [(3, column)]


@pytest.mark.parametrize(
    ("header", "times"),
    [
        ("input_toks,output_toks,arrival_time_ns", [0.25, 1.5]),
        ("RequestID,StartTimeOffset,ContextTokens,GeneratedTokens", [0.25, 1.5]),
        ("arrived_at,num_prefill_tokens,num_decode_tokens", [0.25, 1.5]),
        ("Prompt Tokens;x,output_length,prompt_len", None),
        ("Timestamp,Model,Request tokens,Response tokens", None),
    ],
)
def test_lengths_under_common_names(tmp_path: Path, header: str, times: list[float] | None) -> None:
    values = {"arrival_time_ns": "250000000 1500000000", "StartTimeOffset": "250000000 1500000000"}
    values["arrived_at"] = "0.25 1.5"
    lines = []
    for i in (0, 1):
        fields = []
        for name in header.split(","):
            is_output = any(part in name.lower() for part in ("out", "gen", "dec", "resp"))
            fields.append(values[name].split()[i] if name in values else ("7" if is_output else "5"))
        lines.append(",".join(fields))
    trace = import_trace(write(tmp_path / "t.csv", header, *lines))
    assert trace.kind == "lengths"
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.rows] == [(5, 7)] * 2
    assert trace.has_times == (times is not None)
    if times:
        assert [r.arrival_s for r in trace.rows] == times
    else:
        assert "The file has no arrival times; an arrival process must give them." in trace.notes
        assert trace.ignored_keys


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["a,b", "1,2"], "kind not recognised"),
        (["input_length,prompt_len,output_length", "1,1,1"], "several columns of prompt lengths"),
        (["input_length,Input Length,output_length", "1,1,1"], "column stands twice"),
        (["arrived_at,arrival_ns,input_len,output_len", "1,1,1,1"], "several columns of times"),
        (["input_length,output_length", '1,"2', "3,4"], "not valid CSV"),
        (["input_length,output_length"], "no usable row among 0"),
        (["arrived_at,input_length,output_length", "x,1,1"], "line 2, arrived_at: not a number of seconds"),
        (["arrived_at,input_length,output_length", "nan,1,1"], "line 2, arrived_at: not a finite number"),
        (["arrival_ns,input_length,output_length", "1.5,1,1"], "line 2, arrival_ns: not a whole number"),
        (["arrival_ns,input_length,output_length", "-1,1,1"], "line 2, arrival_ns: negative time"),
        (["arrival_ns,input_length,output_length", "9" * 25 + ",1,1"], "line 2, arrival_ns: later than"),
    ],
)
def test_bad_csv_file(tmp_path: Path, lines: list[str], part: str) -> None:
    with pytest.raises(InputError) as caught:
        import_trace(write(tmp_path / "t.csv", *lines))
    assert part in one_line(caught.value)


def test_wrong_kind_says_what_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "input_length,output_length", "1,2")
    with pytest.raises(InputError, match="column TIMESTAMP missing"):
        import_trace(path, "azure")
    with pytest.raises(InputError, match="line 1, line: not valid JSON"):
        import_trace(path, "mooncake")
    with pytest.raises(InputError, match="line 1: not valid JSON"):
        import_trace(path, "sharegpt", chars_per_token=4)


def test_options_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "input_length,output_length", "1,2")
    for options in (
        {"chars_per_token": 4.0},
        {"strict_keys": True},
        {"sort": True},
        {"spread": True},
        {"keep_ids": True},
    ):
        with pytest.raises(InputError, match=r"[Ll]eave"):
            import_trace(path, **options)


def talk(*turns: tuple[str, object], **more: object) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def test_sharegpt_with_a_tokenizer(tmp_path: Path) -> None:
    entries = [
        talk(("human", "one two three"), ("gpt", "four five"), ("human", "more"), id="a", lang="en"),
        talk(("system", "s"), ("user", "six"), ("assistant", "seven eight nine")),
    ]
    path = write(tmp_path / "t.json", json.dumps(entries))

    def tokenize(text: str) -> list[int]:
        return [1, *range(10, 10 + len(text.split()))]  # as a tokenizer that begins every text with a special token

    trace = import_trace(path, tokenize=tokenize, keep_ids=True)
    assert trace.rows == (
        TraceRow(None, 4, 2, prompt_ids=(1, 10, 11, 12), id="a"),
        TraceRow(None, 2, 3, prompt_ids=(1, 10)),
    )
    assert trace.ignored_keys == ("lang",)
    assert not trace.has_times
    assert any("2 other turns" in note for note in trace.notes)


def test_sharegpt_estimate_is_explicit(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", json.dumps([talk(("human", "x" * 40), ("gpt", "y"))]))
    trace = import_trace(path, chars_per_token=4)
    assert [(r.prompt_tokens, r.output_tokens) for r in trace.rows] == [(10, 1)]
    assert "Lengths are estimated at 4 characters per token." in trace.notes
    for options in (
        {},
        {"chars_per_token": 4, "tokenize": str.split},
        {"chars_per_token": 0},
        {"chars_per_token": 4, "keep_ids": True},
    ):
        with pytest.raises(InputError):
            import_trace(path, **options)


@pytest.mark.parametrize(
    ("entry", "column"),
    [
        (3, "entry"),
        ({}, "conversations"),
        ({"conversations": "hi"}, "conversations"),
        ({"conversations": [{"from": "human"}]}, "conversations"),
        (talk(("human", "hi")), "conversations"),
        (talk(("gpt", "hi"), ("human", "ho")), "conversations"),
        (talk(("human", " "), ("gpt", "ho")), "conversations.value"),
        (talk(("human", 3), ("gpt", "ho")), "conversations.value"),
        (talk(("human", "hi"), ("gpt", "ho"), id=[1]), "id"),
    ],
)
def test_bad_conversation_is_named_or_dropped(tmp_path: Path, entry: object, column: str) -> None:
    fine = talk(("human", "hi"), ("gpt", "ho"))
    path = write(tmp_path / "t.json", json.dumps([fine, entry]))
    with pytest.raises(InputError) as caught:
        import_trace(path, chars_per_token=4)
    assert f"entry 2, {column}: " in one_line(caught.value)
    trace = import_trace(path, chars_per_token=4, on_bad="drop")
    assert (trace.kept, [(d.row, d.column) for d in trace.dropped]) == (1, [(2, column)])


# --- what is done with a trace ------------------------------------------------------------------------------


def test_steps_are_spread() -> None:
    times = [0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0]
    spread = spread_steps([TraceRow(t, 1, 1) for t in times])
    assert [r.arrival_s for r in spread] == [0.0, 1.5, 3.0, 4.0, 5.0, 6.0, 7.5]
    alone = [TraceRow(0.0, 1, 1)] * 2
    assert spread_steps(alone) == alone


def test_stats() -> None:
    made = [TraceRow(t, p, 1, task=k) for t, p, k in ((0.0, 10, "a"), (1.0, 20, "b"), (1.0, 30, "b"), (4.0, 40, "b"))]
    stats = trace_stats(Trace(tuple(made), (Drop(3, "x", 1, "y"),)))
    assert (stats.requests, stats.dropped, stats.duration_s, stats.rate_per_s, stats.ties) == (4, 1, 4.0, 0.75, 1)
    assert stats.gap_cv == pytest.approx((14 / 9) ** 0.5 / (4 / 3))
    assert (stats.prompt_tokens.mean, stats.prompt_tokens.p50, stats.prompt_tokens.largest) == (25, 25, 40)
    assert stats.tasks == {"a": 1, "b": 3}
    one = trace_stats(Trace((TraceRow(None, 1, None, 5),)))
    assert (one.duration_s, one.rate_per_s, one.gap_cv, one.output_tokens) == (None, None, None, None)


# file, kind, rows kept, requests per second, CV of gaps, median prompt and output (all from PROVENANCE.md or counted)
REAL = [
    ("mooncake/conversation_trace_first3000.jsonl", "mooncake", 3000, 3.04, 2.85, 7993, 361.5),
    ("azure/AzureLLMInferenceTrace_conv.csv", "azure", 19366, 5.53, 1.09, 1020, 129),
    ("apex/llama_lmsys_025_lengths.csv", "lengths", 1024, 0.244, 0.97, 17, 117),
    ("apex/llama_creation_025_lengths.csv", "lengths", 512, 0.245, 1.02, 309, 1106.5),
    ("llmservingsim/workloads/sharegpt_llama31_8b_300_lengths.csv", "lengths", 300, 10.26, 0.94, 731.5, 632),
    ("vidur/processed_traces/splitwise_conv.csv", "lengths", 19366, 5.53, 1.09, 1020, 129),
    (
        "vidur/processed_traces/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        "lengths",
        28257,
        None,
        None,
        2730,
        167,
    ),
]


@needs_data
@pytest.mark.parametrize(("name", "kind", "kept", "rate", "cv", "prompt", "output"), REAL)
def test_real_traces(
    name: str, kind: str, kept: int, rate: float | None, cv: float | None, prompt: float, output: float
) -> None:
    trace = import_trace(DATA / name)
    stats = trace_stats(trace)
    assert (trace.kind, trace.kept, trace.dropped) == (kind, kept, ())
    assert stats.rate_per_s == (rate and pytest.approx(rate, rel=0.01))
    assert stats.gap_cv == (cv and pytest.approx(cv, rel=0.01))
    assert stats.output_tokens is not None
    assert (stats.prompt_tokens.p50, stats.output_tokens.p50) == (prompt, output)
    assert trace.has_times == (rate is not None)


@needs_data
def test_two_tellings_of_the_azure_trace_agree() -> None:
    one = import_trace(DATA / "azure/AzureLLMInferenceTrace_conv.csv").rows
    other = import_trace(DATA / "vidur/processed_traces/splitwise_conv.csv").rows
    assert [(r.prompt_tokens, r.output_tokens) for r in one] == [(r.prompt_tokens, r.output_tokens) for r in other]
    worst = max(abs((a.arrival_s or 0) - (b.arrival_s or 0)) for a, b in zip(one, other, strict=True))
    assert worst < 1e-6  # the other one is rounded to microseconds


@needs_data
def test_mooncake_keeps_its_prefix_blocks_and_survives_a_round_trip(tmp_path: Path) -> None:
    trace = load_trace(DATA / "mooncake/conversation_trace_first3000.jsonl", strict_keys=True)
    assert trace.rows[1].hash_ids == (0, *range(14, 28))
    save_trace(trace.rows, tmp_path / "t.jsonl")
    assert load_trace(tmp_path / "t.jsonl").rows == trace.rows


@needs_data
def test_servegen_is_not_mistaken_for_a_trace() -> None:
    with pytest.raises(InputError, match="kind not recognised"):
        import_trace(DATA / "servegen/language/m-small/chunk-18-trace.csv")


# --- samples ------------------------------------------------------------------------------------------------

SAMPLES = {
    "poisson_chat_code.jsonl": 400,
    "bursty_chat_code.jsonl": 400,
    "shift_chat_to_code.jsonl": 400,
    "day_chat_code.jsonl": 600,
}


def test_samples_are_all_known_and_small() -> None:
    found = {path.name: path for path in (ROOT / "traces").glob("*.jsonl")}
    assert found.keys() == SAMPLES.keys()
    for name, path in found.items():
        trace = load_trace(path, strict_keys=True)
        assert trace.kept == SAMPLES[name]
        assert {row.task for row in trace.rows} == {"chat", "code"}
        assert all(row.prompt_tokens + (row.max_tokens or 0) <= 512 for row in trace.rows)
        assert path.stat().st_size < 100_000
        assert name in (ROOT / "traces" / "README.md").read_text()


def test_samples_can_be_made_again(tmp_path: Path) -> None:
    import runpy

    runpy.run_path(str(ROOT / "traces" / "prepare.py"))["main"](tmp_path)
    for name in SAMPLES:
        made, shipped = load_trace(tmp_path / name).rows, load_trace(ROOT / "traces" / name).rows
        # another numpy or libm may round a draw differently
        assert [(r.prompt_tokens, r.output_tokens, r.task) for r in made] == [
            (r.prompt_tokens, r.output_tokens, r.task) for r in shipped
        ]
        assert [r.arrival_s for r in made] == pytest.approx([r.arrival_s for r in shipped], abs=1e-6)
