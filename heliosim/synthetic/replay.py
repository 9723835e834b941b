"""Measured exits as a behaviour table, and a fitted sweep as an exit spec: what a user's own server can be fed with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import ANY_SOURCE
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.profile import BehaviourFacts
from heliosim.streams import stream
from heliosim.synthetic.check import fit_sweep
from heliosim.synthetic.exits import EE_LLAMA_LAYERS, Alignment, MeasuredExits, ThresholdRow, read_alignments
from heliosim.synthetic.exits import read_green_code as read_runs
from heliosim.synthetic.spec import ExitSpec
from heliosim.synthetic.table import BehaviourTable, table_of

PROMPT_TOKENS = {"java": 256, "python": 256}
"""Prompt lengths are not published with the exits: assumed."""
BEFORE, FROM = 0.25, 1.0
"""What stands for a confidence below, and from, the exit a token left at: marks, not measurements."""


def import_green_code(folder: Path, model: str, threshold: float | None, seed: int = 0) -> BehaviourTable:
    """The exits of one model at one threshold as texts, a sample each, replayed at any threshold in (0.25, 1].

    Raises InputError where the folder has no such run.
    """
    runs = [run for run in read_runs(folder) if run.key == model]
    if not runs:
        raise UnknownNameError(f"{folder}: --model", model, {run.key for run in read_runs(folder)})
    known = sorted({run.threshold for run in runs})
    if threshold is None and len(known) == 1:
        threshold = known[0]
    chosen = [run for run in runs if run.threshold == threshold]
    if not chosen or threshold is None:
        remedy = f"Choose with --threshold one of: {', '.join(f'{t:g}' for t in known)}."
        raise InputError(f"{folder}: --threshold", threshold, "one recorded threshold is replayed", remedy)
    alignments = {a.task: a for a in read_alignments(folder) if a.key == model and a.weights == "weighted"}
    return table_of_runs(chosen, alignments, seed)


def table_of_runs(runs: Sequence[MeasuredExits], alignments: dict[str, Alignment], seed: int) -> BehaviourTable:
    """Runs of one model at one threshold, one per task, as a table."""
    first = runs[0]
    name = first.model.lower()
    rows: list[dict[str, Any]] = []
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    tasks: dict[str, int] = {}
    for run in runs:
        n, count = run.per_request, len(run.depths) // run.per_request
        depths = run.depths[: n * count]
        tasks[run.task] = count
        rows += [
            {"sequence": f"{run.task}-{k:04d}", "task": run.task, "prompt_tokens": PROMPT_TOKENS[run.task],
             "tokens": n, "end": n}
            for k in range(count)
        ]  # fmt: skip
        kept = stream(seed, "imported", run.task, "agreement").random(len(depths))
        known = alignments.get(run.task)
        for exit_layer in run.exits:
            score = np.where(depths <= exit_layer, FROM, BEFORE).astype(np.float32)
            share = 1.0 if exit_layer == run.layers else known.by_depth[exit_layer - 1] if known else 0.0
            parts.setdefault(f"confidence:{name}@{exit_layer}", []).append(score)
            parts.setdefault(f"agrees:{name}@{exit_layer}", []).append(kept < share)
    facts = BehaviourFacts(
        tasks=tasks,
        split="imported",
        tokens_per_text=first.per_request,
        threshold=first.threshold,
        sources=(ANY_SOURCE,),
        rows=sum(row["tokens"] for row in rows),
    )
    return BehaviourTable(
        table=table_of(rows, {key: np.concatenate(part) for key, part in parts.items()}),
        facts=facts,
        exits={name: first.exits},
        origin="imported",
        about=_said_of(runs, alignments),
        seed=seed,
    )


def _said_of(runs: Sequence[MeasuredExits], alignments: dict[str, Alignment]) -> tuple[str, ...]:
    first = runs[0]
    lines = [
        f"exit depths of {first.model}: GREEN-CODE (MIT), policy threshold {first.threshold:g}, token by token",
        "confidence is not recorded: 1 from the exit a token left at, 0.25 below, so perplexity says nothing and no "
        "other threshold can be asked about",
        f"prompt lengths assumed: {PROMPT_TOKENS['java']} tokens",
    ]
    for run in runs:
        if run.task in alignments:
            lines.append(f"agreement of {run.task}: drawn (synthetic) with the measured share of each depth")
        else:
            lines.append(f"agreement of {run.task}: not recorded; only the last layer agrees with itself")
        if not run.is_aligned:
            lines.append(f"texts of {run.task}: cut every {run.per_request} tokens; a few samples were shorter")
    return tuple(lines)


def spec_of_sweep(rows: Sequence[ThresholdRow], threshold: float) -> ExitSpec:
    """An exit spec of the 16-layer early-exit Llama: shares by exit of the fitted family at one softmax threshold."""
    family = fit_sweep(rows)
    left = np.round(family.left(threshold), 6)
    left[-1] = 1 - left[:-1].sum()
    source = f"fitted to {len(rows)} rows of mean and spread of exit depth, Facilitated early-exit Llama (Apache-2.0)"
    assumed = {"value": 0.0, "source": "assumed"}
    return ExitSpec.model_validate(
        {
            "schema_version": 1,
            "name": "llama-3.2-1b",
            "about": "Synthetic: a 16-layer early-exit Llama, fitted to a published sweep of softmax thresholds.",
            "threshold": {"value": threshold, "source": "as asked; the sweep's thresholds decay from exit to exit"},
            "models": {
                "llama-3.2-1b": {
                    "layers": EE_LLAMA_LAYERS,
                    "left": {"by_exit": dict(zip(family.exits, left.tolist(), strict=True)), "source": source},
                    "confident_of_rest": {"value": 0.2, "source": "assumed"},
                    "sigma": {"value": round(float(family.sigma[0]), 4), "source": source},
                    "agreement": {"low": 0.85, "high": 0.99, "source": "assumed"},
                }
            },
            "tasks": {
                "cnn-dailymail": {"prompt_tokens": 800, "output_tokens": 80, "source": "assumed: lengths"},
            },
            "tokens": {
                "depth_correlation": {"value": family.depth_correlation, "source": "as in the fit"},
                "autocorrelation": assumed,
                "request_effect": assumed,
                "floor": assumed,
            },
        }
    )
