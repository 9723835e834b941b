"""Prompts to observe models on: held-out ones of the built-in tasks, or those of the user's own file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from heliosim.errors import InputError
from heliosim.formats.files import Strict, validate

EXACT_TASKS = ("qa", "arithmetic", "lists", "code")
"""Built-in tasks whose prompt has one right completion."""
FILE_KINDS = (".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to observe: its name, task and token ids. ``reference``: ids that really follow it, if known;
    ``is_exact``: it is the one right completion.
    """

    sequence: str
    task: str
    ids: tuple[int, ...]
    reference: tuple[int, ...] = ()
    is_exact: bool = False


@dataclass(frozen=True)
class Prompts:
    """``given``: all of them; ``passed_over``: how many were too long for the context."""

    given: Sequence[Prompt]
    passed_over: int = 0

    def first_of_each(self, count: int) -> list[Prompt]:
        """At most ``count`` prompts of every task, in order."""
        seen: dict[str, int] = {}
        kept = []
        for prompt in self.given:
            seen[prompt.task] = seen.get(prompt.task, 0) + 1
            if seen[prompt.task] <= count:
                kept.append(prompt)
        return kept


class Coder:
    """Text to ids and back, in the vocabulary that the models share. ``room``: tokens of a text that the models
    take.
    """

    def __init__(self, tokenizer: Path, eos_ids: Sequence[int], room: int) -> None:
        from tokenizers import Tokenizer

        from heliosim.synth import load_tokenizer

        if not tokenizer.exists():
            remedy = "Add its tokenizer.json."
            raise InputError(str(tokenizer), tokenizer.name, "the checkpoint has no fast tokenizer", remedy)
        self.encode: Callable[[str], tuple[int, ...]] = load_tokenizer(tokenizer)
        self._tokenizer: Any = Tokenizer.from_file(str(tokenizer))
        self.eos_ids, self.room = tuple(eos_ids), room

    def pair(self, prompt: str, completion: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a prompt and of what follows it, with the token that ends a text, cut to the room there is."""
        ids = self.encode(prompt)
        whole = self.encode(prompt + completion)
        rest = whole[len(ids) :]
        if whole[: len(ids)] != ids:  # the seam fell inside a token
            rest = tuple(self._tokenizer.encode(completion, add_special_tokens=False).ids)
        return ids, (*rest, *self.eos_ids[:1])[: max(0, self.room - len(ids))]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without those that end a text."""
        return str(self._tokenizer.decode([i for i in ids if i not in self.eos_ids]))


def prompts_from_tasks(
    tasks: Sequence[str], each: int, split: str, seed: int, coder: Coder, longest: int
) -> list[Prompt]:
    """``each`` prompts of every built-in task; ones longer than ``longest`` tokens are passed over."""
    from heliosim.tasks import documents

    found: list[Prompt] = []
    for task in tasks:
        kept: list[Prompt] = []
        stream: Iterator[Any] = documents(task, split, seed)  # type: ignore[arg-type]
        for k, document in enumerate(stream):
            ids, reference = coder.pair(document.prompt, document.completion)
            if len(ids) <= longest:
                kept.append(Prompt(f"{task}-{len(kept):03d}", task, ids, reference, task in EXACT_TASKS))
            if len(kept) == each or k > 50 * each:
                break
        if len(kept) < each:
            remedy = f"Raise it, or ask for fewer than {each} prompts."
            raise InputError("--max-context", longest, f"only {len(kept)} prompts of task {task!r} fit", remedy)
        found += kept
    return found


class PromptRow(Strict):
    """A line of a prompts file: a ``prompt``, with the ``completion`` that really follows it if known; or a ``text``,
    whose first half stands for the prompt. ``is_exact``: the completion is the one right answer.
    """

    prompt: str | None = Field(default=None, min_length=1)
    completion: str | None = None
    text: str | None = Field(default=None, min_length=2)
    task: str = Field(default="prompts", min_length=1)
    id: str | None = Field(default=None, min_length=1)
    is_exact: bool = False

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> PromptRow:
        if (self.prompt is None) == (self.text is None):
            raise ValueError("give either prompt or text")
        if self.text is not None and self.completion is not None:
            raise ValueError("a text has no completion of its own: give prompt and completion")
        if self.is_exact and self.completion is None:
            raise ValueError("is_exact needs a completion")
        return self


def prompts_from_file(path: Path, coder: Coder, longest: int) -> Prompts:
    """Prompts of a ``.jsonl`` (``PromptRow``) or ``.txt`` file (one prompt a line); ones longer than ``longest``
    tokens are passed over and counted. Raises InputError naming file, line and field.
    """
    if path.suffix not in FILE_KINDS:
        raise InputError("--prompts-file", str(path), "is neither .jsonl nor .txt", "Rename it, or convert it.")
    found: list[Prompt] = []
    names: set[str] = set()
    passed_over = 0
    for number, line in _lines(path):
        row = _row(path, number, line)
        prompt = _prompt(row, row.id or f"line-{number}", coder, longest)
        if prompt.sequence in names:
            raise InputError(f"{path}, line {number}, field id", prompt.sequence, "stands twice", "Give each its own.")
        names.add(prompt.sequence)
        if not prompt.ids or len(prompt.ids) > longest:
            passed_over += 1
        else:
            found.append(prompt)
    if not found:
        problem = f"holds no prompt of 1 to {longest} tokens" if passed_over else "holds no prompts"
        raise InputError("--prompts-file", str(path), problem, "Shorten them, or raise --max-context.")
    return Prompts(found, passed_over)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that hold something, with their numbers; one at a time."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # named in the complaint below
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        where = f"{path}, behind line {number}"
        raise InputError(where, error.object[error.start : error.end], "is not UTF-8", "Convert it.") from None
    except OSError as error:
        raise InputError("--prompts-file", str(path), f"cannot be read ({error.strerror})", "Check it.") from None


def _row(path: Path, number: int, line: str) -> PromptRow:
    where = f"{path}, line {number}"
    if path.suffix == ".txt":
        return PromptRow(prompt=line)
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(where, line[:60], f"is not JSON ({error.msg})", "Write one JSON object a line.") from None
    return validate(PromptRow, content, where)


def _prompt(row: PromptRow, name: str, coder: Coder, longest: int) -> Prompt:
    if row.text is not None:
        ids = coder.encode(row.text)[: coder.room]
        seam = min(max(1, len(ids) // 2), longest)
        return Prompt(name, row.task, ids[:seam], ids[seam:])
    if row.completion is None:
        return Prompt(name, row.task, coder.encode(row.prompt or ""))
    ids, reference = coder.pair(row.prompt or "", row.completion)
    return Prompt(name, row.task, ids, reference, row.is_exact)
