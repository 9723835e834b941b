import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heliosim.cli_trace import trace_app
from heliosim.errors import HelioSimError, InputError
from heliosim.formats.trace import load_trace, trace_stats

runner = CliRunner()


def call(*arguments: object) -> str:
    result = runner.invoke(trace_app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_synth_writes_what_is_asked_for(out: Path) -> None:
    printed = call("synth", "--out", out, "--rate", 4, "--tasks", "chat:30,code:20", "--order", "blocks", "--seed", 3)
    trace = load_trace(out, strict_keys=True)
    assert [row.task for row in trace.rows] == ["chat"] * 30 + ["code"] * 20
    assert all(16 <= row.prompt_tokens <= 256 and row.max_tokens == 128 for row in trace.rows)
    assert "50 kept, 0 dropped" in printed
    assert "chat 30, code 20" in printed
    before = out.read_bytes()
    call("synth", "--out", out, "--rate", 4, "--tasks", "chat:30,code:20", "--order", "blocks", "--seed", 3)
    assert out.read_bytes() == before


def test_synth_draws_shares_of_requests(out: Path) -> None:
    arguments = ("--requests", 400, "--tasks", "chat:3,code", "--prompt", "32", "--prompt", "code=lognormal:100:1:500")
    call("synth", "--out", out, "--rate", 4, "--arrivals", "gamma", "--cv", 3, *arguments, "--output", "8-9")
    trace = load_trace(out)
    stats = trace_stats(trace)
    assert stats.requests == 400
    assert 250 < stats.tasks["chat"] < 350
    assert {row.prompt_tokens for row in trace.rows if row.task == "chat"} == {32}
    assert len({row.prompt_tokens for row in trace.rows if row.task == "code"}) > 20
    assert {row.output_tokens for row in trace.rows} == {8, 9}
    assert stats.gap_cv is not None
    assert stats.gap_cv > 1.5


def test_synth_with_text(out: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tasks = ("--tasks", "chat:2,arithmetic:1", "--requests", 9, "--output", "5-6", "--output", "arithmetic=7")
    printed = call("synth", "--out", out, "--rate", 2, "--text", "--tokenizer", tmp_path, *tasks)
    rows = load_trace(out).rows
    assert sorted(row.task for row in rows) == ["arithmetic"] * 3 + ["chat"] * 6
    assert all(row.prompt_ids for row in rows)
    assert {row.max_tokens for row in rows} == {6, 7}
    assert "prompt ids" in printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--rate 0 --tasks chat:2", "rate_per_s"),
        ("--rate nan --tasks chat:2", "rate_per_s"),
        ("--rate 1", "--tasks: no count (value: 'chat')"),
        ("--rate 1 --tasks chat:2 --arrivals poison", "--arrivals: unknown name (value: 'poison'). Did you mean"),
        ("--rate 1 --tasks chat:2 --arrivals gamma", "--cv: gamma arrivals need it"),
        ("--rate 1 --tasks chat:2 --cv 2", "--cv: poisson arrivals have none"),
        ("--rate 1 --tasks chat:2.5", "not a whole count"),
        ("--rate 1 --tasks chat:-1", "not a whole count"),
        ("--rate 1 --tasks chat:x --requests 5", "not a share"),
        ("--rate 1 --tasks chat:nan --requests 5", "not a share"),
        ("--rate 1 --tasks chat:2,chat:3", "task stands twice"),
        ("--rate 1 --tasks chat:2,,code:2", "a task without a name"),
        ("--rate 1 --tasks chat:2 --order mix", "--order: there is one task only"),
        ("--rate 1 --tasks chat:2,code:2 --order mixed", "--order: unknown name"),
        ("--rate 1 --tasks chat:2 --prompt 9-3", "low (9) must not exceed high (3)"),
        ("--rate 1 --tasks chat:2 --prompt 0", "greater than or equal to 1"),
        ("--rate 1 --tasks chat:2 --prompt lots", "--prompt: not a length"),
        ("--rate 1 --tasks chat:2 --prompt lognormal:3", "--prompt: not a length"),
        ("--rate 1 --tasks chat:2 --output code=3", "--output code=3: unknown name"),
        ("--rate 1 --tasks chat:2 --tokenizer x", "--tokenizer: is for --text only"),
        ("--rate 1 --tasks chat:2 --text", "--tokenizer: --text needs it"),
        ("--rate 1 --tasks chat:2 --text --tokenizer x --prompt 3", "--prompt: with --text"),
        ("--rate 1 --tasks chat:2 --text --tokenizer x --output lognormal:3:1:9", "output lengths are a range"),
        ("--rate 1 --tasks chat:2 --text --tokenizer no-such-model", "no-such-model"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(out: Path, arguments: str, part: str) -> None:
    with pytest.raises(HelioSimError) as caught:
        call("synth", "--out", out, *arguments.split())
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(out.parent.iterdir()) == []


def test_import_says_what_it_saw_and_dropped(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "azure.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:00:00,5,6", "2023-11-16 18:00:01,0,6"]
    source.write_text("\n".join([*lines, *["2023-11-16 18:00:02,x,6"] * 12, "2023-11-16 18:00:03.5,7,8"]))
    with pytest.raises(InputError, match="line 3, ContextTokens: zero length"):
        call("import", source, "--out", out)
    assert not out.exists()
    printed = call("import", source, "--out", out, "--on-bad", "drop")
    assert "2 kept, 13 dropped" in printed
    assert "Read as azure: the header is TIMESTAMP" in printed
    assert "Dropped row 3, ContextTokens: zero length (value: 0)" in printed
    assert "Dropped 3 more" in printed
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in load_trace(out).rows] == [(0, 5, 6), (3.5, 7, 8)]


def test_import_of_lengths_makes_arrivals(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "lengths.csv"
    source.write_text("input_toks,output_toks,name\n5,6,a\n7,8,b\n")
    with pytest.raises(InputError, match=r"has no arrival times .* Make them with --rate"):
        call("import", source, "--out", out)
    with pytest.raises(InputError, match="--seed: is for new arrivals only"):
        call("import", source, "--out", out, "--seed", 1)
    assert not out.exists()
    printed = call("import", source, "--out", out, "--rate", 2, "--arrivals", "constant")
    assert [row.arrival_s for row in load_trace(out).rows] == [0.5, 1.0]
    assert "New arrivals, since the file has none: constant at 2 requests/s." in printed
    assert "Not read: name." in printed
    again = call("import", out, "--out", tmp_path / "faster.jsonl", "--rate", 4, "--arrivals", "constant")
    assert "instead of the file's own" in again


def test_import_of_text_needs_an_estimate(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "talk.json"
    turns = [{"from": "human", "value": "x" * 12}, {"from": "gpt", "value": "y" * 8}]
    source.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    with pytest.raises(InputError, match="text needs a tokenizer or chars_per_token"):
        call("import", source, "--out", out, "--rate", 1)
    printed = call("import", source, "--out", out, "--rate", 1, "--chars-per-token", 4)
    assert "estimated at 4 characters per token" in printed
    (row,) = load_trace(out).rows
    assert (row.prompt_tokens, row.output_tokens, row.id) == (3, 2, "a")


def test_import_does_not_overwrite_its_source(out: Path) -> None:
    call("synth", "--out", out, "--rate", 1, "--tasks", "chat:2")
    before = out.read_bytes()
    with pytest.raises(InputError, match="--out: is the file to read"):
        call("import", out, "--out", out, "--rate", 1)
    assert out.read_bytes() == before


def test_import_spreads_coarse_times(out: Path, tmp_path: Path) -> None:
    source = tmp_path / "steps.jsonl"
    row = {"input_length": 1, "output_length": 1}
    source.write_text("\n".join(json.dumps({"timestamp": t, **row}) for t in (0, 0, 3000, 3000)))
    assert "2 share the time before (coarse? see --spread)" in call("stats", source)
    call("import", source, "--out", out, "--spread")
    assert [r.arrival_s for r in load_trace(out).rows] == [0, 1.5, 3, 4.5]


def test_stats_as_json(out: Path) -> None:
    call("synth", "--out", out, "--rate", 4, "--tasks", "chat:3,code:2", "--prompt", "10")
    with out.open("a") as file:
        file.write('{"timestamp": 999999, "input_length": 0, "output_length": 1}\n')
    with pytest.raises(InputError, match="line 6, input_length: zero length"):
        call("stats", out)
    found = json.loads(call("stats", out, "--on-bad", "drop", "--json"))
    assert (found["requests"], found["dropped"], found["tasks"]) == (5, 1, {"chat": 3, "code": 2})
    assert found["dropped_rows"] == [{"row": 6, "column": "input_length", "value": "0", "reason": "zero length"}]
    assert found["prompt_tokens"]["mean"] == 10


def test_names_in_brackets_are_shown_as_they_are(out: Path) -> None:
    assert "[bold]x[/bold] 2" in call("synth", "--out", out, "--rate", 4, "--tasks", "[bold]x[/bold]:2")


def test_unknown_choices_are_named(out: Path) -> None:
    for arguments, part in (
        (("stats", out, "--kind", "azur"), "--kind: unknown name (value: 'azur'). Did you mean 'azure'"),
        (("stats", out, "--on-bad", "skip"), "--on-bad: unknown name"),
        (("stats", out), "no such file"),
    ):
        with pytest.raises(HelioSimError) as caught:
            call(*arguments)
        assert part in str(caught.value)


def test_nothing_heavy_is_imported_at_start() -> None:
    heavy = "('numpy', 'pandas', 'pydantic', 'tokenizers', 'torch', 'heliosim.workload', 'heliosim.formats.trace')"
    code = f"import sys, heliosim.cli_trace; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
