"""The tokens of a behaviour table as arrays: what its statistics are computed from, whatever wrote the table.

Unlike ``behaviour.Behaviour``, which a simulation replays, this keeps every column there is (margin, entropy,
log-probability, top-1) and texts that no policy wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import ANY_SOURCE, REFERENCE, Behaviour
from heliosim.errors import InputError, UnknownNameError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
FACTS = ("confidence", "margin", "entropy", "logprob", "top1", "agrees")
"""What may be known of a token at an exit; every table has the first and the last."""


@dataclass(frozen=True)
class Tokens:
    """Texts one behind the other. Per text, [texts]: ``sequence``, ``task``, ``source``, ``prompt_tokens``, ``counts``
    (tokens), ``ends`` (natural length, 0: none seen), ``right`` (share of right lines, NaN: unknown). Per token,
    [tokens]: ``columns`` by name, such as ``confidence:small@2``, and ``token_id``.
    """

    exits: Mapping[str, tuple[int, ...]]
    sequence: npt.NDArray[np.str_]
    task: npt.NDArray[np.str_]
    source: npt.NDArray[np.str_]
    prompt_tokens: Ints
    counts: Ints
    ends: Ints
    right: Floats
    columns: Mapping[str, npt.NDArray[Any]]

    @property
    def size(self) -> int:
        """Tokens of all texts."""
        return int(self.counts.sum())

    @cached_property
    def starts(self) -> Ints:
        """Where each text begins, [texts]."""
        return np.concatenate(([0], np.cumsum(self.counts)))[:-1].astype(np.int64)

    @cached_property
    def text(self) -> Ints:
        """The text a token belongs to, [tokens]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def position(self) -> Ints:
        """Place of a token in its text, from 0, [tokens]."""
        return np.arange(self.size) - self.starts[self.text]

    @cached_property
    def request(self) -> Ints:
        """The request a text stands for, [texts]: texts of one prompt under several policies are of one request."""
        return np.unique(self.sequence, return_inverse=True)[1].astype(np.int64)

    @property
    def requests(self) -> int:
        return int(self.request.max()) + 1 if len(self.request) else 0

    @cached_property
    def is_first(self) -> Bools:
        """Whether a token is its text's first, [tokens]."""
        return np.asarray(self.position == 0)

    @cached_property
    def before_end(self) -> Bools:
        """Whether a token stands before or at the natural end of its text, [tokens]."""
        end = np.where(self.ends > 0, self.ends, self.counts)[self.text]
        return np.asarray(self.position < end)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(self.task.tolist()))

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(self.source.tolist()))

    def has(self, what: str) -> bool:
        """Whether this fact is known at every exit of every model."""
        return all(f"{what}:{m}@{e}" in self.columns for m, exits in self.exits.items() for e in exits)

    def exits_of(self, model: str) -> tuple[int, ...]:
        """Raises UnknownNameError for a model the table does not know."""
        if model not in self.exits:
            raise UnknownNameError("model", model, self.exits)
        return self.exits[model]

    def fan(self, what: str, model: str, depth: int | None = None) -> npt.NDArray[Any]:
        """A fact at every exit up to a depth (None: all), [exits, tokens]. InputError where the table lacks it."""
        kept = [e for e in self.exits_of(model) if depth is None or e <= depth]
        if depth is not None and (not kept or kept[-1] != depth):
            raise InputError("depth", depth, f"{model} has no exit there", f"Choose one of {self.exits[model]}.")
        names = [f"{what}:{model}@{e}" for e in kept]
        if absent := [name for name in names if name not in self.columns]:
            raise InputError("behaviour table", absent[0], "the table does not have it", "Measure behaviour again.")
        return np.stack([self.columns[name] for name in names])

    def of(self, *, sources: Collection[str] | None = None, task: str | None = None) -> Tokens:
        """The texts of some sources, or of one task. Raises UnknownNameError for names the table does not know."""
        for name in sources or ():
            if name not in self.sources:
                raise UnknownNameError("behaviour source", name, self.sources)
        if task is not None and task not in self.tasks:
            raise UnknownNameError("task", task, self.tasks)
        kept = np.ones(len(self.counts), bool)
        if sources is not None:
            kept &= np.isin(self.source, list(sources))
        if task is not None:
            kept &= self.task == task
        return self.kept(kept)

    def kept(self, texts: Bools) -> Tokens:
        """Only these texts, [texts]."""
        return self if texts.all() else self.arranged(np.flatnonzero(texts))

    def arranged(self, order: Ints) -> Tokens:
        """These texts in this order, [texts]."""
        counts = self.counts[order]
        before = np.concatenate(([0], np.cumsum(counts)))[:-1]
        rows = np.repeat(self.starts[order] - before, counts) + np.arange(int(counts.sum()))
        return Tokens(
            self.exits,
            sequence=self.sequence[order],
            task=self.task[order],
            source=self.source[order],
            prompt_tokens=self.prompt_tokens[order],
            counts=counts,
            ends=self.ends[order],
            right=self.right[order],
            columns=_Rows(self.columns, rows),
        )

    def source_of(self, model: str) -> str:
        """Whose texts a model's open-loop statistics rest on unless another is asked for: its own at full depth, else
        synthetic or imported ones, else the references, else the first there are.
        """
        for name in (f"{model}:full", ANY_SOURCE, REFERENCE):
            if name in self.sources:
                return name
        if not self.sources:
            raise InputError("behaviour table", 0, "it holds no texts", "Measure or synthesize behaviour.")
        return self.sources[0]


class _Rows(Mapping[str, npt.NDArray[Any]]):
    """Some rows of columns, taken when asked for."""

    def __init__(self, columns: Mapping[str, npt.NDArray[Any]], rows: Ints) -> None:
        self._columns, self._rows = columns, rows
        self._taken: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._taken:
            self._taken[name] = self._columns[name][self._rows]
        return self._taken[name]

    def __iter__(self) -> Any:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def tokens_of(behaviour: Behaviour) -> Tokens:
    """The tokens of what a simulation replays: confidences and agreement only."""
    keys = list(behaviour.texts)
    texts = [behaviour.texts[key] for key in keys]
    columns: dict[str, npt.NDArray[Any]] = {}
    for model, exits in behaviour.exits.items():
        for key in (f"{model}@{e}" for e in exits):
            columns[f"confidence:{key}"] = _joined([t.confidence[key] for t in texts], np.float32)
            columns[f"agrees:{key}"] = _joined([t.agrees[key] for t in texts], np.bool_)
    return Tokens(
        behaviour.exits,
        np.array([sequence for sequence, _ in keys], str),
        np.array([t.task for t in texts], str),
        np.array([source for _, source in keys], str),
        np.array([t.prompt_tokens for t in texts], np.int64),
        np.array([t.tokens for t in texts], np.int64),
        np.array([t.end or 0 for t in texts], np.int64),
        np.full(len(texts), np.nan),
        columns,
    )


def _joined(parts: Sequence[npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def exit_index(tokens: Tokens, model: str, threshold: float, depth: int | None = None) -> Ints:
    """Which exit each token leaves at under a threshold: the first confident one, else the deepest, [tokens]."""
    enough = tokens.fan("confidence", model, depth) >= threshold
    enough[-1] = True
    return np.asarray(enough.argmax(axis=0), np.int64)


def breaches_at(tokens: Tokens, model: str, threshold: float, depth: int | None = None) -> Bools:
    """Whether a token is below the threshold at every exit up to a depth, and so breaches there, [tokens]."""
    return np.asarray((tokens.fan("confidence", model, depth) < threshold).all(axis=0), bool)


def exit_layers(tokens: Tokens, model: str, threshold: float, depth: int | None = None) -> Ints:
    """The same in layers, [tokens]."""
    return np.asarray(tokens.exits_of(model), np.int64)[exit_index(tokens, model, threshold, depth)]
