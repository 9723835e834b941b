"""A profile of the group's models, as `heliosim calibrate` makes it, and the error it states of itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heliosim_calibrate.calibrate import Request, calibrate

from heliosim.errors import InputError
from heliosim.formats.profile import Profile
from heliosim.hold_out import sentence, verdict

from .book import Book
from .shapes import STAND_IN_NOTE, checkpoint_of, drop_engine, dtype_of, shapes_of


def run(book: Book) -> None:
    """Calibrate the shapes of the group, of random weights: times and bytes, no behaviour."""
    drop_engine(book)
    work = book.shared["work"]
    shapes = shapes_of(book.shared["group"])
    names = [checkpoint_of(s, book.options, work) for s in shapes]
    if not book.options.is_gpu:
        book.note(STAND_IN_NOTE)
    sizes = (32, 1024, 1024) if book.options.is_gpu else (4, 144, 64)
    _errors(book, _calibrated(book, names, sizes), [s.model for s in shapes])


def tiny(book: Book) -> None:
    """Calibrate shipped models, with their exits: behaviour too."""
    _with_exits(book, _models(book))


def trained(book: Book) -> None:
    """Calibrate the pair that was trained here."""
    folder = Path(book.shared["work"]) / "trained"
    missing = [name for name in _models(book) if not (folder / name / "exits.json").exists()]
    if missing:
        raise InputError("trained pair", ", ".join(missing), "the training of this group gave none", "See its error.")
    _with_exits(book, [str(folder / name) for name in _models(book)])


def _models(book: Book) -> list[str]:
    return [a.key.removesuffix(".holdout") for a in book.measure.asked if a.key.endswith(".holdout")]


def _with_exits(book: Book, checkpoints: Sequence[str]) -> None:
    profile = _calibrated(book, checkpoints, (16, 256, 256) if book.options.is_gpu else (4, 128, 64))
    _errors(book, profile, _models(book))
    verdicts = [str(p.get("verdict", "")) for p in profile.facts.premises]
    holding = sum(v == "holds" for v in verdicts)
    book.put("premises", holding, note=f"of {len(verdicts)} that could be asked")


def _calibrated(book: Book, models: Sequence[str], sizes: tuple[int, int, int]) -> Profile:
    """``sizes``: largest batch, longest context, most tokens in a step. As many rounds as the time allows."""
    max_batch, max_context, token_budget = sizes
    is_quick = book.options.is_quick or not book.options.is_gpu
    values: dict[str, Any] = {
        "models": models,
        "out": profile_folder(book),
        "device": book.options.device,
        "dtype": dtype_of(book.options),
        "max_batch": max_batch,
        "max_context": max_context,
        "token_budget": token_budget,
        "rounds": 1 if is_quick else 3,
        "prompts_per_task": 2 if is_quick else 8,
        "tokens_per_text": 24 if is_quick else 48,
        "seed": book.options.seed,
        "overwrite": True,
        "hardware": "quick" if is_quick else "auto",
        "budget_s": max(5.0, 0.8 * book.left_s),
    }
    last = [""]

    def progress(what: str, share: float) -> None:
        stage = what.split(" of ")[0]
        if stage != last[0]:
            last[0] = stage
            print(f"  {share:4.0%} {what}", flush=True)

    return calibrate(Request(**values), progress)


def profile_folder(book: Book) -> Path:
    """Where the group's profile lies."""
    return Path(book.shared["work"]) / "profiles" / book.shared["group"]


def _errors(book: Book, profile: Profile, models: Sequence[str]) -> None:
    """Median held-out error of each model. Within the measured noise is a pass, too, and said."""
    clock = profile.clock()
    for name in models:
        fit = profile.model(name).step[clock]
        said = verdict(fit.holdout)
        if said == "not scored":
            book.cannot(f"{name}.holdout", sentence(fit.holdout))
            continue
        passes = said in ("met", "within noise") if book.options.is_gpu else None
        note = f"{clock} clock; {sentence(fit.holdout)}"
        book.put(f"{name}.holdout", fit.holdout.median_abs_error, note=note, passes=passes)
        book.row(model=name, clock=clock, holdout=fit.holdout.model_dump(mode="json"))
