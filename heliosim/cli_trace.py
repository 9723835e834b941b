"""``heliosim trace``: make, import and describe traces. Everything heavy is imported when a command runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliosim.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from heliosim.arrivals import Gaps
    from heliosim.formats.trace import LengthStats, Tokenize, Trace, TraceRow

trace_app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_KINDS = ("auto", "mooncake", "azure", "sharegpt", "lengths")
_SHOWN_DROPS = 10

Kind = Annotated[str, typer.Option(help=f"Form of the file: {', '.join(_KINDS)} (mooncake is also our own).")]
OnBad = Annotated[str, typer.Option(help="Bad rows: stop at the first, or drop and list them.")]
Sort = Annotated[bool, typer.Option("--sort", help="Sort by time instead of refusing rows that go back in time.")]
Spread = Annotated[bool, typer.Option("--spread", help="Spread requests with equal times evenly up to the next time.")]
CharsPerToken = Annotated[
    float | None, typer.Option(help="For text without a tokenizer: estimate lengths (English: about 4).")
]
TokenizerName = Annotated[
    str | None, typer.Option(help="tokenizer.json, a folder that holds one, or a shipped model's name.")
]
ArrivalKind = Annotated[str, typer.Option(help="poisson, gamma or constant.")]
Cv = Annotated[float | None, typer.Option(help="For gamma: standard deviation of the gaps over their mean.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random stream.")]


@trace_app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Trace to write (JSON Lines).")],
    rate: Annotated[float, typer.Option(help="Mean arrivals per second.")],
    tasks: Annotated[
        str, typer.Option(help="chat:100,code:100. Counts; with --requests shares of it (chat alone: share 1).")
    ] = "chat",
    requests: Annotated[int | None, typer.Option(min=1, help="Requests in all.")] = None,
    arrivals: ArrivalKind = "poisson",
    cv: Cv = None,
    order: Annotated[str | None, typer.Option(help="blocks or mix; default for several tasks: mix.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt tokens: 128, 16-256 or lognormal:MEAN:CV:MAX; for one task code=64-512. Repeatable. "
            "Default: 16-256."
        ),
    ] = None,
    output: Annotated[list[str] | None, typer.Option(help="Output tokens, likewise. Default: 16-128.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Real prompts of the task families, for live runs.")] = False,
    tokenizer: TokenizerName = None,
    seed: Seed = 0,
) -> None:
    """Make a trace: arrivals from a process, lengths drawn, or with --text real prompts as vocabulary ids."""
    from heliosim.formats.trace import Trace, save_trace

    named = _parse_tasks(tasks, requests)
    if order is not None and len(named) == 1:
        raise InputError("--order", order, "there is one task only", "Leave it out or name more tasks.")
    chosen = None if len(named) == 1 else _one_of("--order", order or "mix", ("blocks", "mix"))
    process = _process(arrivals, rate, cv)
    if text:
        if prompt:
            raise InputError("--prompt", prompt, "with --text the prompts have their own lengths", "Leave it out.")
        rows = _text_rows(named, requests, process, chosen, output, tokenizer, seed)
    else:
        if tokenizer is not None:
            raise InputError("--tokenizer", tokenizer, "is for --text only", "Add --text or leave it out.")
        rows = _drawn_rows(named, requests, process, chosen, prompt, output, seed)
    save_trace(rows, out)
    _print_stats(Trace(tuple(rows), source=str(out)))
    typer.echo(f"Written to {out}")


@trace_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="File to read.")],
    out: Annotated[Path, typer.Option(help="Trace to write (JSON Lines).")],
    kind: Kind = "auto",
    on_bad: OnBad = "stop",
    sort: Sort = False,
    spread: Spread = False,
    tokenizer: TokenizerName = None,
    chars_per_token: CharsPerToken = None,
    keep_ids: Annotated[bool, typer.Option("--keep-ids", help="Keep the prompts' ids, for live runs.")] = False,
    rate: Annotated[
        float | None, typer.Option(help="New arrivals at this mean rate per second; needed where there are none.")
    ] = None,
    arrivals: Annotated[str | None, typer.Option(help="With --rate: poisson (default), gamma or constant.")] = None,
    cv: Cv = None,
    seed: Annotated[int | None, typer.Option(min=0, help="With --rate: seed of the arrivals, default 0.")] = None,
) -> None:
    """Bring a foreign trace into our form; says what it saw, kept and dropped."""
    from dataclasses import replace

    from heliosim.formats.trace import import_trace, save_trace

    _refuse_overwriting(source, out)
    process = _new_arrivals(rate, arrivals, cv, seed)
    trace = import_trace(
        source,
        _one_of("--kind", kind, _KINDS),
        on_bad=_one_of("--on-bad", on_bad, ("stop", "drop")),
        sort=sort,
        spread=spread,
        tokenize=_tokenize(tokenizer),
        chars_per_token=chars_per_token,
        keep_ids=keep_ids,
    )
    if process is not None:
        times = process.times(trace.kept, seed or 0)
        rows = tuple(replace(row, arrival_s=time) for row, time in zip(trace.rows, times, strict=True))
        instead = "instead of the file's own" if trace.has_times else "since the file has none"
        note = f"New arrivals, {instead}: {process.kind} at {process.rate_per_s:g} requests/s."
        trace = replace(trace, rows=rows, notes=(*trace.notes, note))
    elif not trace.has_times:
        raise InputError(str(source), trace.kind, "has no arrival times", "Make them with --rate (and --arrivals).")
    save_trace(trace.rows, out)
    _print_stats(trace)
    typer.echo(f"Written to {out}")


@trace_app.command()
def stats(
    source: Annotated[Path, typer.Argument(help="Trace in any known form.")],
    kind: Kind = "auto",
    on_bad: OnBad = "stop",
    sort: Sort = False,
    spread: Spread = False,
    tokenizer: TokenizerName = None,
    chars_per_token: CharsPerToken = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Describe a trace: rate, burstiness, lengths, tasks, rows kept and dropped."""
    from heliosim.formats.trace import import_trace

    trace = import_trace(
        source,
        _one_of("--kind", kind, _KINDS),
        on_bad=_one_of("--on-bad", on_bad, ("stop", "drop")),
        sort=sort,
        spread=spread,
        tokenize=_tokenize(tokenizer),
        chars_per_token=chars_per_token,
    )
    if as_json:
        typer.echo(json.dumps(_as_json(trace), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_stats(trace)


# --- options ------------------------------------------------------------------------------------------------


def _one_of(option: str, value: str, known: tuple[str, ...]) -> Any:
    if value not in known:
        raise UnknownNameError(option, value, known)
    return value


def _parse_tasks(text: str, requests: int | None) -> list[tuple[str, float]]:
    """Names with their numbers: shares if ``requests`` is given, else counts."""
    named: list[tuple[str, float]] = []
    for part in text.split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if not name:
            raise InputError("--tasks", text, "a task without a name", "Write chat:100,code:100.")
        if name in [other for other, _ in named]:
            raise InputError("--tasks", name, "task stands twice", "Add the numbers up.")
        if not colon and requests is None:
            raise InputError("--tasks", part, "no count", "Write chat:100, or give --requests.")
        named.append((name, _task_number(part, number if colon else "1", is_share=requests is not None)))
    return named


def _task_number(part: str, text: str, *, is_share: bool) -> float:
    try:
        number = float(text) if is_share else int(text)
    except ValueError:
        number = 0
    if not 0 < number < 1e9:
        what = "share > 0" if is_share else "whole count > 0"
        raise InputError("--tasks", part, f"the number is not a {what}", "Write chat:100.")
    return number


def _process(kind: str, rate: float, cv: float | None) -> Gaps:
    from heliosim.arrivals import ARRIVALS, Gaps
    from heliosim.formats.files import validate

    fields: dict[str, Any] = {"kind": _one_of("--arrivals", kind, ("poisson", "gamma", "constant")), "rate_per_s": rate}
    if kind == "gamma" and cv is None:
        raise InputError("--cv", cv, "gamma arrivals need it", "Pass --cv 3 for bursty, --cv 0.3 for even arrivals.")
    if kind != "gamma" and cv is not None:
        raise InputError("--cv", cv, f"{kind} arrivals have none to choose", "Pass --arrivals gamma or leave it out.")
    if cv is not None:
        fields["cv"] = cv
    process = validate(ARRIVALS[kind], fields, "--rate/--cv")
    assert isinstance(process, Gaps)
    return process


def _new_arrivals(rate: float | None, kind: str | None, cv: float | None, seed: int | None) -> Gaps | None:
    if rate is not None:
        return _process(kind or "poisson", rate, cv)
    for option, value in (("--arrivals", kind), ("--cv", cv), ("--seed", seed)):
        if value is not None:
            raise InputError(option, value, "is for new arrivals only", "Add --rate or leave it out.")
    return None


def _parse_lengths(option: str, given: list[str] | None, default: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """A length distribution for each task, as the data of a specification."""
    found: dict[str, dict[str, Any]] = {}
    common = _length(option, default)
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals:
            common = _length(option, text)
        elif name.strip() not in names:
            raise UnknownNameError(f"{option} {text}", name.strip(), names)
        else:
            found[name.strip()] = _length(option, value)
    return {name: found.get(name, common) for name in names}


def _length(option: str, text: str) -> dict[str, Any]:
    remedy = "Write 128, 16-256 or lognormal:MEAN:CV:MAX."
    try:
        if text.startswith("lognormal:"):
            mean, cv, high = text.split(":")[1:]
            return {"kind": "lognormal", "mean": float(mean), "cv": float(cv), "high": int(high)}
        low, dash, top = text.partition("-")
        if dash:
            return {"kind": "uniform", "low": int(low), "high": int(top)}
        return {"kind": "fixed", "tokens": int(text)}
    except ValueError:
        raise InputError(option, text, "not a length or a range of lengths", remedy) from None


def _drawn_rows(
    named: list[tuple[str, float]],
    requests: int | None,
    process: Gaps,
    order: Any,
    prompt: list[str] | None,
    output: list[str] | None,
    seed: int,
) -> list[TraceRow]:
    from heliosim.formats.files import validate
    from heliosim.synth import drawn_trace
    from heliosim.workload import WorkloadSpec

    names = [name for name, _ in named]
    prompts = _parse_lengths("--prompt", prompt, "16-256", names)
    outputs = _parse_lengths("--output", output, "16-128", names)
    number = "count" if requests is None else "share"
    tasks = [
        {"task": name, number: size, "prompt_tokens": prompts[name], "output_tokens": outputs[name]}
        for name, size in named
    ]
    fields = {"requests": requests, "arrivals": process, "tasks": tasks, "order": order}
    return drawn_trace(validate(WorkloadSpec, fields, "trace synth"), seed)


def _text_rows(
    named: list[tuple[str, float]],
    requests: int | None,
    process: Gaps,
    order: Any,
    output: list[str] | None,
    tokenizer: str | None,
    seed: int,
) -> list[TraceRow]:
    from heliosim.synth import TextTask, find_tokenizer, text_trace
    from heliosim.workload import apportion

    if tokenizer is None:
        raise InputError("--tokenizer", None, "--text needs it", "Name a tokenizer.json or a shipped model.")
    sizes = [int(size) for _, size in named] if requests is None else apportion([s for _, s in named], requests)
    outputs = _parse_lengths("--output", output, "16-128", [name for name, _ in named])
    tasks = [
        TextTask(name, size, _range(outputs[name])) for (name, _), size in zip(named, sizes, strict=True) if size > 0
    ]
    return text_trace(
        tasks, order=order or "blocks", arrivals=process, seed=seed, tokenizer_file=find_tokenizer(tokenizer)
    )


def _range(length: dict[str, Any]) -> tuple[int, int]:
    if length["kind"] == "lognormal":
        raise InputError("--output", "lognormal", "with --text output lengths are a range", "Write 16-128.")
    if length["kind"] == "fixed":
        return length["tokens"], length["tokens"]
    return length["low"], length["high"]


def _tokenize(name: str | None) -> Tokenize | None:
    if name is None:
        return None
    from heliosim.synth import find_tokenizer, load_tokenizer

    return load_tokenizer(find_tokenizer(name))


def _refuse_overwriting(source: Path, out: Path) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise InputError("--out", str(out), "is the file to read", "Choose another name.")


# --- output -------------------------------------------------------------------------------------------------


def _as_json(trace: Trace) -> dict[str, Any]:
    from heliosim.formats.trace import trace_stats

    drops = [
        {"row": d.row, "column": d.column, "value": repr(d.value)[:120], "reason": d.reason} for d in trace.dropped
    ]
    return {
        "source": trace.source,
        "kind": trace.kind,
        **asdict(trace_stats(trace)),
        "dropped_rows": drops,
        "ignored_keys": list(trace.ignored_keys),
        "notes": list(trace.notes),
    }


def _print_stats(trace: Trace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from heliosim.formats.trace import trace_stats

    found = trace_stats(trace)
    console = Console(soft_wrap=True)
    table = Table(title=escape(trace.source), title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value")
    table.add_row("requests", f"{found.requests} kept, {found.dropped} dropped")
    if found.duration_s is not None:
        table.add_row("duration", f"{found.duration_s:,.1f} s")
    if found.rate_per_s is not None:
        table.add_row("rate", f"{found.rate_per_s:.3g} requests/s")
    if found.gap_cv is not None:
        table.add_row("gap CV", f"{found.gap_cv:.2f} (Poisson: 1)")
    if found.ties:
        hint = " (coarse? see --spread)" if found.ties > found.requests / 4 else ""
        table.add_row("equal times", f"{found.ties} share the time before{hint}")
    table.add_row("prompt tokens", _lengths_text(found.prompt_tokens))
    if found.output_tokens is not None:
        table.add_row("output tokens", _lengths_text(found.output_tokens))
    tasks = ", ".join(f"{name or '(none)'} {count}" for name, count in sorted(found.tasks.items()))
    table.add_row("tasks", escape(tasks))
    if found.with_prompt_ids:
        table.add_row("prompt ids", str(found.with_prompt_ids))
    console.print(table)
    for note in trace.notes:
        console.print(escape(note))
    if trace.ignored_keys:
        console.print(f"Not read: {escape(', '.join(trace.ignored_keys))}.")
    for drop in trace.dropped[:_SHOWN_DROPS]:
        console.print(f"Dropped {escape(str(drop))}")
    if len(trace.dropped) > _SHOWN_DROPS:
        console.print(f"Dropped {len(trace.dropped) - _SHOWN_DROPS} more; --json of stats lists them all.")


def _lengths_text(lengths: LengthStats) -> str:
    mean = f"{lengths.mean:,.{1 if lengths.mean < 1000 else 0}f}"
    return (
        f"mean {mean}, p50 {lengths.p50:,.0f}, p90 {lengths.p90:,.0f}, p99 {lengths.p99:,.0f}, max {lengths.largest:,}"
    )
