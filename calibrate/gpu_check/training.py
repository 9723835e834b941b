"""A pair large enough that layers cost real time, trained from scratch here: behaviour that is real, if not general."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from heliosim_calibrate.behaviour import prompts_from_tasks

from heliosim.synth import load_tokenizer
from heliosim.tasks import FAMILIES

from .book import Book
from .plan import trained_names

THRESHOLD = 0.8
HELD_OUT = 12
"""Texts of each task that are looked at."""


def recipes(book: Book) -> tuple[Any, Any]:
    """About 30M and 120M parameters, exits anywhere; on a CPU two very small ones, to see that it works."""
    from heliosim_calibrate.tiny.train import GENERAL, TECHNICAL, Recipe

    names = trained_names(book.options)
    if not book.options.is_gpu:
        small: dict[str, Any] = {"width": 32, "heads": 4, "ffn": 64}
        return (
            Recipe(names[0], "llama", 4, (2, 4), GENERAL, 60, 201, **small),
            Recipe(names[1], "llama", 6, (2, 4, 6), TECHNICAL, 60, 202, **small),
        )
    return (
        Recipe(names[0], "llama", 10, (2, 4, 6, 8, 10), GENERAL, 20_000, 201, 512, 8, 1408),
        Recipe(names[1], "llama", 12, (3, 6, 9, 12), TECHNICAL, 20_000, 202, 1024, 16, 2432),
    )


def run(book: Book) -> None:
    """Train both, then say how often and how rightly the larger one leaves early on held-out text."""
    from heliosim_calibrate.tiny.train import train

    folder = Path(book.shared["work"]) / "trained"
    pair = recipes(book)
    losses: dict[str, float] = {}
    for recipe, share in zip(pair, (0.3, 0.6), strict=True):
        minutes = share * book.measure.seconds / 60
        made = train(recipe, folder, minutes=minutes, device=book.options.device)
        losses = _losses(made)
        book.row(model=recipe.name, minutes=minutes, losses=losses)
    book.put("train.loss", float(np.mean(list(losses.values()))), note=f"{pair[1].name}, mean of {len(losses)} tasks")
    _early(book, folder / pair[1].name, pair[1].exits)


def _losses(folder: Path) -> dict[str, float]:
    import json

    said: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    found: dict[str, float] = said["held_out_loss"]
    return found


def _early(book: Book, folder: Path, exits: tuple[int, ...]) -> None:
    """Teacher-forced on prompts: the first exit at or above the threshold, and whether the last layer agrees."""
    from heliosim.engines.torch import TorchEngine

    tokenize = load_tokenizer(folder / "tokenizer.json")
    prompts = prompts_from_tasks(FAMILIES, HELD_OUT, "calibration", book.options.seed, tokenize, 400)
    engine = TorchEngine({folder.name: folder}, device=book.options.device, dtype="float32")
    scores = engine.score(folder.name, [p.ids for p in prompts if len(p.ids) > 1], exits)
    early = agreeing = tokens = 0
    for seen in scores:
        is_sure = seen.max_probs[:-1] >= THRESHOLD
        leaves = is_sure.any(0)
        first = is_sure.argmax(0)
        said = seen.ids[first, np.arange(seen.ids.shape[1])]
        tokens += leaves.size
        early += int(leaves.sum())
        agreeing += int((leaves & (said == seen.ids[-1])).sum())
    book.put("train.early", early / tokens, note=f"{tokens:,} tokens of held-out prompts, threshold {THRESHOLD}")
    if early:
        book.put("train.agreement", agreeing / early)
    else:
        book.cannot("train.agreement", "no token left early")
