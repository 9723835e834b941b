"""Three models of a sequence of states, each a finite mixture of Markov chains: independent draws, one chain, and a
chain whose parameters depend on the request (a class each text belongs to).

Transitions are counted and drawn a little towards what is more certain, as under Dirichlet priors: a chain's rows
towards the overall shares, a class's rows towards the chain's. Classes are fitted by expectation-maximisation from a
fixed start, and how many there are is chosen by the likelihood of texts left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from heliosim.errors import InputError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
ChainKind = Literal["iid", "markov", "markov-request"]
CHAIN_KINDS: tuple[ChainKind, ...] = get_args(ChainKind)
CLASSES = (2, 3, 4, 6)
"""Numbers of classes to choose from."""
_TOWARDS_SHARES, _TOWARDS_CHAIN = 1.0, 8.0
"""Tokens' worth of the priors."""
_ROUNDS, _ENOUGH = 60, 1e-5
_FOLDS = 2


@dataclass(frozen=True)
class Texts:
    """States of texts one behind the other: ``states`` [tokens] from 0, ``text`` [tokens] (rising), ``count`` texts,
    and how many states there are.
    """

    states: Ints
    text: Ints
    count: int
    kinds: int

    @property
    def firsts(self) -> Ints:
        """Where texts begin."""
        return np.flatnonzero(np.concatenate(([len(self.text) > 0], self.text[1:] != self.text[:-1])))

    @property
    def seconds(self) -> Ints:
        """Tokens that have one before them in their text."""
        return (
            np.flatnonzero(np.concatenate(([False], self.text[1:] == self.text[:-1]))) if len(self.text) else self.text
        )

    def of(self, texts: npt.NDArray[np.bool_]) -> Texts:
        """Some texts, numbered anew."""
        kept = texts[self.text]
        number = np.cumsum(texts) - 1
        return Texts(self.states[kept], number[self.text[kept]], int(texts.sum()), self.kinds)


@dataclass(frozen=True)
class Chain:
    """``weights`` [classes]; by class the chances of a text's first state, ``start`` [classes, states], and of the
    state behind each state, ``step`` [classes, states, states].
    """

    kind: ChainKind
    weights: Floats
    start: Floats
    step: Floats

    @property
    def classes(self) -> int:
        return len(self.weights)

    def log_likelihood(self, texts: Texts) -> float:
        """Natural-log likelihood of all texts."""
        return float(_mixed(self._by_class(texts)).sum())

    def _by_class(self, texts: Texts) -> Floats:
        """Log of weight times likelihood of every text under every class, [texts, classes]."""
        first, later = texts.firsts, texts.seconds
        with np.errstate(divide="ignore"):
            start, step, weights = np.log(self.start), np.log(self.step), np.log(self.weights)
        found = np.empty((texts.count, self.classes))
        for k in range(self.classes):
            gains = step[k, texts.states[later - 1], texts.states[later]]
            found[:, k] = weights[k] + np.bincount(texts.text[later], weights=gains, minlength=texts.count)
            found[texts.text[first], k] += start[k, texts.states[first]]
        return found

    def shares(self, texts: Texts) -> Floats:
        """Chance of each class given a text, [texts, classes]."""
        found = self._by_class(texts)
        return np.asarray(np.exp(found - _mixed(found)[:, None]), np.float64)

    def draw(self, length: int, classes: Floats, rng: np.random.Generator) -> Ints:
        """Texts of ``length`` states, [texts, length]; ``classes``: a number in [0, 1) per text that says its class."""
        own = np.minimum(np.searchsorted(np.cumsum(self.weights), classes, side="right"), self.classes - 1)
        start, step = np.cumsum(self.start, axis=1), np.cumsum(self.step, axis=2)
        last = start.shape[1] - 1
        found = np.empty((len(classes), length), np.int64)
        for at in range(length):
            edges = start[own] if at == 0 else step[own, found[:, at - 1]]
            found[:, at] = np.minimum((rng.random(len(classes))[:, None] >= edges).sum(axis=1), last)
        return found


def _mixed(by_class: Floats) -> Floats:
    """Log of a sum over classes, [texts]."""
    top = by_class.max(axis=1)
    return np.asarray(top + np.log(np.exp(by_class - top[:, None]).sum(axis=1)), np.float64)


def fit_chain(kind: ChainKind, texts: Texts, order: Floats | None = None, classes: int | None = None) -> Chain:
    """Fit one of the three. ``order`` [texts]: what classes are first told apart by, say each text's mean depth;
    None: the mean state. ``classes``: None chooses among ``CLASSES``. Raises InputError for texts without tokens.
    """
    if not len(texts.states):
        raise InputError("texts", 0, "there are no tokens to fit a chain to", "Measure behaviour first.")
    shares = np.bincount(texts.states, minlength=texts.kinds).astype(np.float64)
    shares /= shares.sum()
    if kind == "iid":
        step = np.broadcast_to(shares, (1, texts.kinds, texts.kinds)).copy()
        return Chain(kind, np.ones(1), shares[None], step)
    towards = np.broadcast_to(shares, (texts.kinds, texts.kinds))
    whole = np.ones(texts.count)
    start, step = _counted(texts, whole, shares, towards, _TOWARDS_SHARES)
    chain = Chain("markov", np.ones(1), start[None], step[None])
    if kind == "markov":
        return chain
    if order is None:
        order = text_means(texts.states.astype(np.float64), texts.text, texts.count)
    return _with_classes(texts, order, chain, classes or _classes_for(texts, order, chain))


def text_means(values: Floats, text: Ints, count: int) -> Floats:
    """Mean of a value over the tokens of each text, [texts]."""
    sums = np.bincount(text, weights=values, minlength=count)
    return np.asarray(sums / np.maximum(np.bincount(text, minlength=count), 1), np.float64)


def _counted(texts: Texts, weights: Floats, shares: Floats, towards: Floats, strength: float) -> tuple[Floats, Floats]:
    """Start and step from weighted texts, drawn towards ``shares`` and ``towards`` by ``strength`` tokens' worth."""
    n, first, later = texts.kinds, texts.firsts, texts.seconds
    begun = np.bincount(texts.states[first], weights=weights[texts.text[first]], minlength=n) + strength * shares
    pairs = texts.states[later - 1] * n + texts.states[later]
    moved = np.bincount(pairs, weights=weights[texts.text[later]], minlength=n * n).reshape(n, n)
    stepped = moved + strength * towards
    return begun / begun.sum(), stepped / stepped.sum(axis=1, keepdims=True)


def _with_classes(texts: Texts, order: Floats, chain: Chain, classes: int) -> Chain:
    """Expectation-maximisation from texts told apart by ``order``."""
    rank = np.argsort(np.argsort(order, kind="stable"), kind="stable")
    own = np.minimum(rank * classes // max(1, texts.count), classes - 1)
    belongs = np.full((texts.count, classes), 0.1 / classes)
    belongs[np.arange(texts.count), own] += 0.9
    before, found = -np.inf, chain
    for _ in range(_ROUNDS):
        parts = [_counted(texts, column, chain.start[0], chain.step[0], _TOWARDS_CHAIN) for column in belongs.T]
        weights = (belongs.sum(axis=0) + 1) / (texts.count + classes)
        found = Chain("markov-request", weights, *(np.stack(p) for p in zip(*parts, strict=True)))
        by_class = found._by_class(texts)
        mixed = _mixed(by_class)
        belongs = np.exp(by_class - mixed[:, None])
        now = float(mixed.sum())
        if now - before < _ENOUGH * abs(now):
            break
        before = now
    return found


def _classes_for(texts: Texts, order: Floats, chain: Chain, choices: Sequence[int] = CLASSES) -> int:
    """The number of classes under which texts left out are likeliest; 2 where there are too few texts to tell."""
    if texts.count < 4 * _FOLDS:
        return choices[0]
    fold = np.arange(texts.count) % _FOLDS
    found = []
    for classes in (c for c in choices if c * 4 <= texts.count):
        total = 0.0
        for k in range(_FOLDS):
            fitted = _with_classes(texts.of(fold != k), order[fold != k], chain, classes)
            total += fitted.log_likelihood(texts.of(fold == k))
        found.append((total, classes))
    return max(found, key=lambda pair: (pair[0], -pair[1]))[1] if found else choices[0]
