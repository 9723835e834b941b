"""Traces made here: drawn lengths, or real prompts of the task families as vocabulary ids for live runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heliosim.arrivals import Gaps
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import read_json
from heliosim.formats.trace import Tokenize, TraceRow
from heliosim.lengths import Fixed, Uniform
from heliosim.workload import TaskSpec, WorkloadSpec, build_arrivals


def drawn_trace(spec: WorkloadSpec, seed: int) -> list[TraceRow]:
    """An open workload as rows of a native trace: what ``build_arrivals`` gives, in a file's form."""
    return [
        TraceRow(
            arrival_s=arrival.request.arrival_s,
            prompt_tokens=arrival.request.prompt_tokens,
            output_tokens=arrival.content.output_tokens,
            max_tokens=arrival.request.max_tokens,
            task=arrival.content.task,
            prompt_ids=arrival.content.prompt_ids,
        )
        for arrival in build_arrivals(spec, seed)
    ]


@dataclass(frozen=True, slots=True)
class TextTask:
    """``count`` requests of a task family, each with an output length drawn uniformly from ``output_tokens``."""

    task: str
    count: int
    output_tokens: tuple[int, int]


def text_trace(
    tasks: Sequence[TextTask],
    *,
    order: Literal["blocks", "mix"],
    arrivals: Gaps,
    seed: int,
    tokenizer_file: Path | str,
) -> list[TraceRow]:
    """A trace with real prompts, for live runs: documents of ``heliosim.tasks`` (split live) as vocabulary ids.

    The k-th request of a family gets its k-th document; ``max_tokens`` is the upper end of the task's range.
    Prompts are tokenized as ``load_tokenizer`` says. Documents of code and prose depend on the Python version.
    """
    _check_text_tasks(tasks)
    specs = tuple(
        TaskSpec(
            task=task.task,
            count=task.count,
            prompt_tokens=Fixed(tokens=1),  # the documents' lengths replace it
            output_tokens=Uniform(low=task.output_tokens[0], high=task.output_tokens[1]),
        )
        for task in tasks
    )
    spec = WorkloadSpec(arrivals=arrivals, tasks=specs, order=order)
    tokenize = load_tokenizer(tokenizer_file)
    prompts = {task.task: _prompts(task.task, seed, tokenize) for task in tasks}
    rows = []
    for arrival in build_arrivals(spec, seed):
        request, content = arrival.request, arrival.content
        ids = next(prompts[content.task])
        rows.append(TraceRow(request.arrival_s, len(ids), content.output_tokens, request.max_tokens, content.task, ids))
    return rows


def _check_text_tasks(tasks: Sequence[TextTask]) -> None:
    from heliosim.tasks import FAMILIES

    if not tasks:
        raise InputError("tasks", [], "no task", f"Name at least one of {', '.join(FAMILIES)}.")
    for task in tasks:
        if task.task not in FAMILIES:
            raise UnknownNameError("tasks", task.task, FAMILIES)
        low, high = task.output_tokens
        if not 1 <= low <= high:
            where = f"tasks.{task.task}.output_tokens"
            raise InputError(where, task.output_tokens, "not a range", "Give 1 <= low <= high.")
        if task.count < 1:
            raise InputError(f"tasks.{task.task}.count", task.count, "less than 1", "Give a count >= 1.")


def _prompts(family: str, seed: int, tokenize: Tokenize) -> Iterator[tuple[int, ...]]:
    """Endless prompts of one family as vocabulary ids."""
    from heliosim.tasks import documents

    return (tuple(tokenize(document.prompt)) for document in documents(family, "live", seed))


def load_tokenizer(file: Path | str) -> Tokenize:
    """Text to vocabulary ids as a model is fed them, by a ``tokenizer.json`` (package ``tokenizers``, extra ``live``).

    If a ``tokenizer_config.json`` beside the file names a ``bos_token`` (and no ``add_bos_token: false``) and the
    tokenizer does not begin with it by itself, it is put in front.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        remedy = "Install heliosim[live]."
        raise InputError("tokenizer", str(file), "the package tokenizers is not installed", remedy) from None
    path = Path(file)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        problem = f"cannot be read ({' '.join(str(error).split())})"
        raise InputError(f"{path}, tokenizer", path.name, problem, _TOKENIZER_REMEDY) from None
    bos = _bos_id(path.with_name("tokenizer_config.json"), tokenizer)

    def tokenize(text: str) -> tuple[int, ...]:
        ids = tuple(tokenizer.encode(text).ids)
        return ids if bos is None or ids[:1] == (bos,) else (bos, *ids)

    return tokenize


_TOKENIZER_REMEDY = "Give a tokenizer.json, or the name of a shipped model."


def _bos_id(config: Path, tokenizer: Any) -> int | None:
    if not config.is_file():
        return None
    content = read_json(config)
    if not isinstance(content, dict) or content.get("add_bos_token") is False:
        return None
    token = content.get("bos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if name is None:
        return None
    found: int | None = tokenizer.token_to_id(str(name))
    if found is None:
        raise InputError(f"{config}, bos_token", name, "not in the vocabulary", "Restore the tokenizer's files.")
    return found


def find_tokenizer(name: str) -> Path:
    """The tokenizer file for a path (a file, or a folder that holds ``tokenizer.json``) or for a shipped model's name.

    A shipped model without a file of its own uses the one all shipped models share.
    """
    path = Path(name)
    if path.is_file():
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    shipped = Path(__file__).parent / "checkpoints"
    folders = {p.name: p for p in shipped.iterdir() if (p / "config.json").is_file() and p.name[0] != "."}
    if name in folders:
        for candidate in (folders[name] / "tokenizer.json", shipped / "tokenizer" / "tokenizer.json"):
            if candidate.is_file():
                return candidate
    raise UnknownNameError("tokenizer (no such file; shipped models)", name, folders)
