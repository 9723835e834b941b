"""One call for the whole of `heliosim calibrate tune-exits`: checkpoint and text in, heads and figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from heliosim.engines.models.host import HostModel
from heliosim.errors import InputError
from heliosim.formats.checkpoint import SHIPPED, CheckpointInfo, checkpoint_path, inspect_checkpoint
from heliosim.synth import load_tokenizer

from ..device import resolve_device, version_facts
from .figures import ExitFigures
from .text import Texts, built_in_texts, texts_of_file
from .train import Progress, Recipe, train
from .write import require_writable, write_heads


@dataclass(frozen=True)
class Asked:
    """What to tune. ``text``: a file, None for the built-in tasks. ``mlp`` None: as wide as the model. ``dtype`` None:
    float32 on a CPU, bfloat16 on a GPU. ``recipe``: ``exits`` and ``mlp`` there are set from here.
    """

    checkpoint: str
    exits: Sequence[int]
    text: Path | None
    out: Path | None = None
    mlp: int | None = None
    length: int = 256
    held_out_tokens: int = 16_384
    device: str = "auto"
    dtype: str | None = None
    threads: int = 1
    is_copied: bool = False
    overwrite: bool = False
    recipe: Recipe = field(default_factory=lambda: Recipe((), 0))


@dataclass(frozen=True)
class Answer:
    """Where the heads are, and what they are worth, by exit. ``untuned``: exits that training did not make better."""

    folder: Path
    before: dict[int, ExitFigures]
    after: dict[int, ExitFigures]
    untuned: tuple[int, ...]
    steps: int
    seconds: float
    why: str
    texts: Texts


def tune_exits(asked: Asked, progress: Progress = lambda _what, _share: None) -> Answer:
    """Train heads and write them. Raises InputError for what cannot be tuned, before anything is read or trained."""
    device = resolve_device(asked.device)
    dtype = asked.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    folder = checkpoint_path(asked.checkpoint)
    info = _bare(folder, dtype)
    exits = _exits(asked.exits, info)
    mlp = info.hidden if asked.mlp is None else asked.mlp
    if not mlp and not asked.recipe.has_norm:
        raise InputError("--mlp", 0, "without an MLP and a norm there is nothing to train", "Drop --no-norm.")
    require_writable(folder, asked.out, overwrite=asked.overwrite, is_shipped=asked.checkpoint in SHIPPED)
    recipe = replace(asked.recipe, exits=exits, mlp=mlp)
    if device == "cpu":
        torch.set_num_threads(asked.threads)
    progress("reading text", 0.0)
    texts = _texts(asked, info, recipe)
    tuned = train(HostModel(info), device, texts, recipe, progress)
    record = {
        "schema_version": 1,
        "text": texts.source,
        "tokens": {"train": texts.train_tokens, "held_out": texts.held_out_tokens},
        "steps": tuned.steps,
        "ended": tuned.why,
        "seed": recipe.seed,
        "mlp": mlp,
        "has_norm": recipe.has_norm,
        "dtype": dtype,
        "threshold": recipe.threshold,
        "agreement": recipe.agreement,
        "versions": version_facts(),
        "exits": {
            str(e): {"best_step": tuned.best_step[e], "before": tuned.before[e].row(), "after": tuned.after[e].row()}
            for e in exits
        },
    }
    layers = [*exits, info.spec.layers]
    kinds: dict[str, Any] = {"overwrite": asked.overwrite, "is_copied": asked.is_copied}
    made = write_heads(folder, asked.out, tuned.heads.tensors(), layers, record, **kinds)
    untuned = tuple(e for e in exits if not tuned.best_step[e])
    return Answer(made, tuned.before, tuned.after, untuned, tuned.steps, tuned.seconds, tuned.why, texts)


def _bare(folder: Path, dtype: str) -> CheckpointInfo:
    """The checkpoint without the heads it may have."""
    if dtype == "float16":
        remedy = "Tune in bfloat16 or float32; the heads serve in any dtype."
        raise InputError("--dtype", dtype, "gradients vanish in it", remedy)
    info = inspect_checkpoint(folder, dtype)
    if info.random is not None:
        problem = "random weights say nothing that an exit could learn"
        raise InputError("checkpoint", str(folder), problem, "Give a folder with trained weights.")
    if info.tokenizer_file is None:
        path = folder / "tokenizer.json"
        raise InputError(str(path), path.name, "the checkpoint has no fast tokenizer", "Add its tokenizer.json.")
    return inspect_checkpoint(folder, dtype, exits=[info.spec.layers])


def _exits(wanted: Sequence[int], info: CheckpointInfo) -> tuple[int, ...]:
    """Layers to train heads for, ascending; the last layer needs none."""
    layers = info.spec.layers
    for e in wanted:
        if not 1 <= e <= layers:
            remedy = f"Give layers from 1 to {layers - 1}, separated by commas."
            raise InputError("--exits", e, f"is no layer of a model with {layers}", remedy)
    found = tuple(sorted(set(wanted) - {layers}))
    if not found:
        raise InputError("--exits", list(wanted), "no exit before the last layer", f"Give layers below {layers}.")
    return found


def _texts(asked: Asked, info: CheckpointInfo, recipe: Recipe) -> Texts:
    assert info.tokenizer_file is not None
    if asked.length > info.positions:
        raise InputError("--length", asked.length, f"the model has {info.positions} positions", "Give a shorter one.")
    encode = load_tokenizer(info.tokenizer_file)
    sizes = {
        "length": asked.length,
        "train_tokens": recipe.steps * recipe.batch * asked.length,
        "held_out_tokens": asked.held_out_tokens,
    }
    if asked.text is None:
        texts = built_in_texts(encode, info.eos_ids, **sizes, seed=recipe.seed)
    else:
        texts = texts_of_file(asked.text, encode, info.eos_ids, **sizes)
    most = max(max(window) for part in (texts.train, texts.held_out) for window in part)
    if most >= info.vocab:
        problem = f"the tokenizer makes an id outside the vocabulary of {info.vocab}"
        raise InputError(str(info.tokenizer_file), most, problem, "Use the model's own tokenizer.")
    return texts
