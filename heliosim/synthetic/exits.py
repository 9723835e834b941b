"""Exits that others measured: readers of published files, as tables of depths.

GREEN-CODE (MIT): per generated token the layer it left at, decided by the probability of a small learnt policy, **not**
by a softmax confidence; agreement with the last layer by depth. Facilitated early-exit Llama (Apache-2.0): mean exit
depth and perplexity against softmax thresholds. Both count layers from 0; depths here are layers run, from 1.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heliosim.errors import InputError
from heliosim.formats.files import read_json

GREEN_CODE = {
    "opt": ("OPT-2.7B", 32, (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)),
    "llama": ("Llama-3.2-3B", 28, (4, 6, 8, 10, 12, 14, 18, 22, 26, 28)),
}
"""By model: its name, its layers, and the depths its tokens leave at."""
NEW_TOKENS = 15
"""Tokens GREEN-CODE generates per sample."""
_EXITS = re.compile(r"_thresh_(\d+(?:\.\d+)?)_.*_(java|python)_exit_layers\.json$")
_LAST_WORDS = "Point at the folder results/ of GREEN-CODE, or a part of it."


@dataclass(frozen=True)
class MeasuredExits:
    """Where the tokens of one run left. ``depths``: layers run by each token, [tokens], in order of generation.

    ``per_request``: tokens of a sample; ``is_aligned``: whether all samples have exactly so many, so that token k
    belongs to sample k // per_request. Otherwise a few samples are shorter and the borders drift.
    """

    model: str
    key: str
    task: str
    threshold: float
    layers: int
    exits: tuple[int, ...]
    depths: npt.NDArray[np.int64]
    per_request: int = NEW_TOKENS

    @property
    def is_aligned(self) -> bool:
        return len(self.depths) % self.per_request == 0 and self.task == "python"

    @property
    def never_exits(self) -> bool:
        """Whether every token ran all layers."""
        return bool((self.depths == self.layers).all())

    def left(self) -> npt.NDArray[np.float64]:
        """Share of tokens that left at each exit, [exits]."""
        return np.array([(self.depths == e).mean() for e in self.exits])


@dataclass(frozen=True)
class Alignment:
    """Share of tokens whose top token after each layer is that of the last layer, [layers], for one set of weights."""

    key: str
    task: str
    weights: str
    by_depth: tuple[float, ...]


@dataclass(frozen=True)
class ThresholdRow:
    """One row of the early-exit Llama's sweep: softmax thresholds of the first and last exit, and what came of it."""

    first: float
    last: float
    perplexity: float
    mean_depth: float
    std_depth: float


def read_green_code(folder: Path) -> list[MeasuredExits]:
    """All runs with exits below a folder, by task, model and threshold. Raises InputError naming what is wrong."""
    if not folder.is_dir():
        raise InputError(str(folder), folder.name, "no such folder", _LAST_WORDS)
    found = [_read_exits(path, match) for path in sorted(folder.rglob("*.json")) if (match := _EXITS.search(path.name))]
    if not found:
        raise InputError(str(folder), folder.name, "holds no *_thresh_*_exit_layers.json", _LAST_WORDS)
    return sorted(found, key=lambda run: (run.task, run.key, run.threshold))


def _read_exits(path: Path, match: re.Match[str]) -> MeasuredExits:
    key = "opt" if "opt" in path.name.split("_thresh_")[0] else "llama"
    name, layers, exits = GREEN_CODE[key]
    raw = read_json(path)
    if not isinstance(raw, list) or not raw or not all(type(x) is int for x in raw):
        raise InputError(str(path), path.name, "a flat list of layers is wanted", _LAST_WORDS)
    depths = np.minimum(np.asarray(raw, np.int64) + 1, layers)  # layers count from 0; 32 of OPT's 0-31 is no exit
    if odd := sorted(set(depths.tolist()) - set(exits)):
        problem = f"{name} has no exit behind layer {odd[0] - 1}"
        raise InputError(str(path), odd[0] - 1, problem, f"Exits behind layers {[e - 1 for e in exits]}.")
    return MeasuredExits(name, key, match[2], float(match[1]), layers, exits, depths)


def read_alignments(folder: Path) -> list[Alignment]:
    """Agreement with the last layer by depth, where a folder has it."""
    found = []
    for path in sorted(folder.rglob("avg_align_*.json")):
        match = re.match(r"avg_align_(opt|llama)_(java|python)_.*_with_(base|weighted)\.json$", path.name)
        if match is None:
            continue
        key, task, weights = match.groups()
        raw = read_json(path)
        shares = raw.get("acc") if isinstance(raw, dict) else None
        layers = GREEN_CODE[key][1]
        if not isinstance(shares, list) or len(shares) != layers:
            raise InputError(str(path), path.name, f"a list acc of {layers} shares is wanted", _LAST_WORDS)
        found.append(Alignment(key, task, weights, tuple(map(float, shares))))
    return found


@dataclass(frozen=True)
class Evaluation:
    """What a run of GREEN-CODE cost and was worth: per sample seconds and joules, and scores 0 to 1."""

    key: str
    task: str
    threshold: float
    codebleu: float
    exact_match: float
    seconds: float
    joules: float


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Quality, time and energy of the runs with a threshold, where a folder has them."""
    found = []
    for path in sorted(folder.rglob("eval_rl_model_*.json")):
        match = re.search(r"_(opt|llama)[^_]*_thresh_(\d+(?:\.\d+)?)_.*_(java|python)\.json$", path.name)
        if match is None:
            continue
        raw = read_json(path)
        merged: dict[str, Any] = {k: v for part in raw if isinstance(part, dict) for k, v in part.items()}
        if lacking := {"codebleu", "exact_match", "mean_time", "mean_energy"} - set(merged):
            raise InputError(str(path), path.name, f"figure {sorted(lacking)[0]} is missing", _LAST_WORDS)
        values = (float(merged[k]) for k in ("codebleu", "exact_match", "mean_time", "mean_energy"))
        found.append(Evaluation(match[1], match[3], float(match[2]), *values))
    return found


_COLUMNS = (
    "softmax_threshold_first_exit",
    "softmax_threshold_last_exit",
    "ppl_mean",
    "exit_point_mean",
    "exit_point_std",
)
EE_LLAMA_LAYERS = 16


def read_ee_llama(path: Path) -> list[ThresholdRow]:
    """The sweep of the 16-layer early-exit Llama. Raises InputError naming line and column."""
    if path.is_dir():
        files = sorted(path.glob("*.csv"))
        if len(files) != 1:
            raise InputError(str(path), len(files), "one CSV file is wanted here", "Name the file itself.")
        path = files[0]
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise InputError(str(path), path.name, "no such file", "Check the path.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(path), path.name, f"not readable as CSV: {error}", "Check the file.") from None
    found = []
    for number, row in enumerate(rows, 2):
        try:
            first, last, perplexity, mean, std = (float(row[c]) for c in _COLUMNS)
        except (KeyError, TypeError, ValueError) as error:
            where = f"{path}, line {number}"
            raise InputError(where, str(error), "not a row of the sweep", f"Columns: {', '.join(_COLUMNS)}.") from None
        found.append(ThresholdRow(first, last, perplexity, mean + 1, std))
    if not found:
        raise InputError(str(path), path.name, "has no rows", "Check the file.")
    return found


def autocorrelation(depths: npt.NDArray[np.int64], lag: int = 1) -> float | None:
    """Correlation of exit depth between tokens ``lag`` apart; None if all are alike."""
    centred = depths - depths.mean()
    power = float((centred**2).mean())
    return None if power == 0 else float((centred[:-lag] * centred[lag:]).mean()) / power


def request_effect(run: MeasuredExits, lags: Sequence[int] = range(8, 15)) -> float | None:
    """Share of the variance of exit depth that tokens of one sample have in common: correlation of tokens 8 to 14 apart
    within a sample, where persistence from token to token has died out. None if nothing varies.
    """
    count = len(run.depths) // run.per_request * run.per_request
    centred = (run.depths[:count] - run.depths.mean()).reshape(-1, run.per_request)
    power = float((centred**2).mean())
    if power == 0:
        return None
    products = np.concatenate([(centred[:, :-lag] * centred[:, lag:]).ravel() for lag in lags])
    return float(products.mean()) / power
