"""Measure what HELIOS takes for granted, on the tiny checkpoints: do its premises hold here?

Everything is teacher-forced on the `calibration` split, completion tokens only (the closing token included), in
float32 from the float16 files. A token is *easy* at an exit when the confidence there (largest probability) reaches
the threshold, else *hard*. "Unchanged" means that the exit's top token is the final layer's.
What this does not know: free-running text, other thresholds, and the paper's models; the paper's figures stand
beside ours for comparison only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from heliosim.tasks import FAMILIES, Document, documents

from .heads import load_heads
from .tokenizer import load_tokenizer
from .train import RECIPES, Depths, encode, write_json

THRESHOLD = 0.8
DOCUMENTS = 130  # per task
SEED = 7
PROBE = 5  # requests that a HELIOS candidate is judged by

# (at least this: holds, at least this: weak); below: does not hold. The first one is the paper's figure where
# the paper gives one and a tiny model could reach it.
UNCHANGED_LIMITS = (0.85, 0.70)  # all tokens at the first exit; the paper: at least 85 %
UNCHANGED_LOW_LIMITS = (0.70, 0.50)  # tokens below the threshold at the first exit
COMPLEMENT_LIMITS = (
    0.40,
    0.15,
)  # the small member's hard tokens that are easy for the other; the paper: 57 %
LOCALITY_LIMITS = (0.50, 0.25)  # 1 - (error of a 5-request profile in its own task / in another task)
TASK_LIMITS = (0.40, 0.20)  # largest less smallest share of easy tokens among the tasks, first exit

PAIRS = (
    ("tiny-opt-s", "tiny-opt-l"),
    ("tiny-llama-s", "tiny-llama-l"),
    ("tiny-opt-s", "tiny-llama-l"),
    ("tiny-llama-s", "tiny-opt-l"),
)
BEGIN, END = "<!-- measured: begin (written by premises.py) -->", "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Trace:
    """What one model says about the completion tokens of one task, exit by exit (exits, tokens)."""

    document: NDArray[np.int64]  # (tokens,): which document a token is from
    exits: tuple[int, ...]
    top: NDArray[np.int64]
    confidence: NDArray[np.float64]
    log_probability: NDArray[np.float64]  # of the token that really comes

    @property
    def easy(self) -> NDArray[np.bool_]:
        """Confidence reaches the threshold, per exit and token."""
        return self.confidence >= THRESHOLD

    @property
    def unchanged(self) -> NDArray[np.bool_]:
        """The exit's top token is the final layer's, per exit and token."""
        return self.top == self.top[-1]

    @property
    def depth(self) -> NDArray[np.int64]:
        """The first exit at which a token is easy, in layers; the last exit takes the rest."""
        sure = self.easy.copy()
        sure[-1] = True
        return np.asarray(self.exits)[sure.argmax(axis=0)]


def joined(traces: Iterable[Trace]) -> Trace:
    """Several tasks as one trace; documents stay apart."""
    parts = list(traces)
    offsets = np.cumsum([0, *(int(part.document.max()) + 1 for part in parts)])
    return Trace(
        np.concatenate([part.document + offset for part, offset in zip(parts, offsets, strict=False)]),
        parts[0].exits,
        np.concatenate([part.top for part in parts], axis=1),
        np.concatenate([part.confidence for part in parts], axis=1),
        np.concatenate([part.log_probability for part in parts], axis=1),
    )


def held_out(family: str) -> list[Document]:
    """The first distinct documents of the calibration split."""
    found: dict[str, Document] = {}
    for document in islice(documents(family, "calibration", SEED), 3 * DOCUMENTS):
        found.setdefault(document.prompt, document)
    return list(found.values())[:DOCUMENTS]


@torch.no_grad()
def trace(folder: Path, texts: dict[str, list[Document]]) -> dict[str, Trace]:
    """Run one checkpoint over all texts, every exit at every token."""
    exits = tuple(json.loads((folder / "exits.json").read_text(encoding="utf-8"))["exits"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    depths, heads, tokenizer = Depths(model), load_heads(folder), load_tokenizer(folder)
    found = {}
    for family, some in texts.items():
        top, confidence, log_probability, document = [], [], [], []
        for index, (ids, prompt) in enumerate(encode(tokenizer, some)):
            states = depths.hidden_states(torch.tensor([ids[:-1]]))
            rows = []
            for layer in exits:
                hidden = states[layer][0, prompt - 1 :]
                adapted = heads[layer](hidden) if heads is not None and layer != exits[-1] else hidden
                rows.append(depths.logits(adapted).log_softmax(-1))
            log_p = torch.stack(rows)  # (exits, tokens, vocabulary)
            best, which = log_p.max(-1)
            target = torch.tensor(ids[prompt:]).expand(len(exits), -1)
            top.append(which.numpy())
            confidence.append(best.double().exp().numpy())
            log_probability.append(log_p.gather(-1, target[..., None])[..., 0].double().numpy())
            document.append(np.full(target.shape[1], index))
        found[family] = Trace(
            np.concatenate(document),
            exits,
            np.concatenate(top, axis=1),
            np.concatenate(confidence, axis=1),
            np.concatenate(log_probability, axis=1),
        )
    return found


# --- figures ------------------------------------------------------------------------------------------------


def _mean(values: NDArray[Any]) -> float | None:
    return round(float(values.mean()), 4) if values.size else None


def exit_figures(of: Trace) -> list[dict[str, Any]]:
    """Per exit: layer, share of easy tokens, unchanged (all, hard only), perplexity."""
    return [
        {
            "layer": layer,
            "easy": _mean(of.easy[i]),
            "unchanged": _mean(of.unchanged[i]),
            "unchanged_if_hard": _mean(of.unchanged[i][~of.easy[i]]),
            "perplexity": round(math.exp(-of.log_probability[i].mean()), 3),
        }
        for i, layer in enumerate(of.exits)
    ]


def lag_one(of: Trace) -> float | None:
    """Correlation of exit depth between neighbouring tokens of one document; None when depth never varies."""
    depth = of.depth.astype(float)
    same = of.document[1:] == of.document[:-1]
    before, after = depth[:-1][same], depth[1:][same]
    if before.std() == 0 or after.std() == 0:
        return None
    return round(float(np.corrcoef(before, after)[0, 1]), 3)


def complement(of: Trace, other: Trace) -> dict[str, float | None]:
    """How much of what is hard for one member at its first exit is easy for the other at its first exit."""
    hard, easy = ~of.easy[0], other.easy[0]
    return {"hard": _mean(hard), "easy_for_other_if_hard": _mean(easy[hard]), "easy_for_other": _mean(easy)}


def profile_errors(traces: dict[str, Trace]) -> tuple[float, float]:
    """Mean error of the share of easy tokens foretold by 5 requests: for their own task, and for another task."""
    own, foreign = [], []
    shares = {family: float(of.easy[0].mean()) for family, of in traces.items()}
    for family, of in traces.items():
        for start in range(0, int(of.document.max()) + 2 - PROBE, PROBE):
            inside = (of.document >= start) & (of.document < start + PROBE)
            foretold = float(of.easy[0][inside].mean())
            own.append(abs(foretold - shares[family]))
            foreign += [abs(foretold - share) for other, share in shares.items() if other != family]
    return float(np.mean(own)), float(np.mean(foreign))


def verdict(value: float | None, limits: tuple[float, float]) -> str:
    """`holds`, `weak` or `does not hold`, by two limits."""
    if value is None:
        return "not measured"
    return "holds" if value >= limits[0] else "weak" if value >= limits[1] else "does not hold"


def measure(out: Path) -> dict[str, Any]:
    """All figures and verdicts, as they go into premises.json."""
    torch.set_num_threads(1)
    texts = {family: held_out(family) for family in FAMILIES}
    traces = {name: trace(out / name, texts) for name in RECIPES}
    whole = {name: joined(by_task.values()) for name, by_task in traces.items()}
    models, verdicts = {}, []
    for name, by_task in traces.items():
        tasks = {family: {"exits": exit_figures(of), "lag_one": lag_one(of)} for family, of in by_task.items()}
        own, foreign = profile_errors(by_task)
        models[name] = {
            "tasks": tasks,
            "all": {"exits": exit_figures(whole[name]), "lag_one": lag_one(whole[name])},
            "profile_error": {"own_task": round(own, 4), "other_task": round(foreign, 4)},
        }
        first = exit_figures(whole[name])[0]
        stays = 1 - own / foreign if foreign else None
        easy = [float(of.easy[0].mean()) for of in by_task.values()]
        verdicts += [
            _judged("early exits differ by task", name, max(easy) - min(easy), TASK_LIMITS),
            _judged("first exit unchanged, all tokens", name, first["unchanged"], UNCHANGED_LIMITS),
            _judged("first exit unchanged, hard tokens", name, first["unchanged_if_hard"], UNCHANGED_LOW_LIMITS),
            _judged("a 5-request profile stays valid in its task", name, stays, LOCALITY_LIMITS),
        ]
    pairs = []
    for small, large in PAIRS:
        there, back = complement(whole[small], whole[large]), complement(whole[large], whole[small])
        by_task = {
            family: {
                "small_to_large": complement(traces[small][family], traces[large][family]),
                "large_to_small": complement(traces[large][family], traces[small][family]),
            }
            for family in FAMILIES
        }
        pairs.append(
            {
                "small": small,
                "large": large,
                "small_to_large": there,
                "large_to_small": back,
                "tasks": by_task,
            }
        )
        value = there["easy_for_other_if_hard"]
        verdicts.append(_judged("exits complement each other", f"{small} -> {large}", value, COMPLEMENT_LIMITS))
    return {
        "schema_version": 1,
        "threshold": THRESHOLD,
        "split": "calibration",
        "seed": SEED,
        "documents": {family: len(some) for family, some in texts.items()},
        "tokens": {family: len(of.document) for family, of in traces["tiny-opt-s"].items()},
        "models": models,
        "pairs": pairs,
        "verdicts": verdicts,
    }


def _judged(premise: str, subject: str, value: float | None, limits: tuple[float, float]) -> dict[str, Any]:
    shown = None if value is None else round(value, 4)
    return {
        "premise": premise,
        "subject": subject,
        "value": shown,
        "limits": list(limits),
        "verdict": verdict(value, limits),
    }


# --- tables -------------------------------------------------------------------------------------------------


def _cell(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(found: dict[str, Any], training: dict[str, dict[str, Any]]) -> str:
    """The measured part of the model card."""
    parts = ["### Training", _training_table(training)]
    parts += [
        "### Tasks and exits",
        f"Teacher-forced on {sum(found['documents'].values())} held-out documents "
        f"({sum(found['tokens'].values())} completion tokens), threshold {found['threshold']}. Figures per exit, "
        "from the first to the last, divided by slashes. *Easy*: share of tokens with confidence at or above the "
        "threshold. *Unchanged*: share whose top token is the final layer's. *Lag 1*: correlation of exit depth "
        "between neighbouring tokens.",
    ]
    for name, model in found["models"].items():
        layers = [str(one["layer"]) for one in model["all"]["exits"]]
        rows = [_task_row(task, figures) for task, figures in [*model["tasks"].items(), ("**all**", model["all"])]]
        head = ["task", "easy", "unchanged", "unchanged if hard", "perplexity", "lag 1"]
        parts += [f"**{name}**, exits {' / '.join(layers)}", _table(head, rows)]
    parts += ["### Two members on the same text", *_pair_tables(found["pairs"])]
    rows = [
        [
            one["premise"],
            one["subject"],
            _cell(one["value"]),
            " / ".join(_cell(limit) for limit in one["limits"]),
            one["verdict"],
        ]
        for one in sorted(found["verdicts"], key=lambda one: str(one["premise"]))
    ]
    parts += [
        "### Do the premises hold here?",
        "Computed from the limits in `premises.py` (at least the first: holds; at least the second: weak).",
        _table(["premise", "of", "value", "limits", "verdict"], rows),
    ]
    return "\n\n".join(parts)


def _task_row(task: str, figures: dict[str, Any]) -> list[str]:
    exits, early = figures["exits"], figures["exits"][:-1]

    def by_exit(key: str, some: list[dict[str, Any]], digits: int = 2) -> str:
        return " / ".join(_cell(one[key], digits) for one in some)

    return [
        task,
        by_exit("easy", exits),
        by_exit("unchanged", early),
        by_exit("unchanged_if_hard", early),
        by_exit("perplexity", exits),
        _cell(figures["lag_one"]),
    ]


def _pair_tables(pairs: list[dict[str, Any]]) -> list[str]:
    rows = []
    for pair in pairs:
        for key, one, other in (("small_to_large", "small", "large"), ("large_to_small", "large", "small")):
            figures = pair[key]
            by_task = " / ".join(_cell(pair["tasks"][family][key]["easy_for_other_if_hard"]) for family in FAMILIES)
            shares = [_cell(figures[what]) for what in ("hard", "easy_for_other_if_hard", "easy_for_other")]
            rows.append([pair[one], pair[other], *shares, by_task])
    head = [
        "hard for",
        "at the first exit of",
        "share hard",
        "easy for the other if hard",
        "easy for the other",
        "by task",
    ]
    return [
        "Of the tokens that are hard at the first exit of one member, the share that is easy at the first exit of the "
        f"other, beside the share of all tokens. By task: {' / '.join(FAMILIES)}. The paper's figure is 0.57.",
        _table(head, rows),
    ]


def _training_table(training: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, about in training.items():
        losses = " / ".join(_cell(about["held_out_loss"][family]) for family in FAMILIES)
        heads = about.get("heads")
        minutes = f"{about['training_seconds'] / 60:.0f}"
        more = f" + {heads['training_seconds'] / 60:.0f} (heads)" if heads else ""
        rows.append([name, str(about["steps"]), f"{about['tokens'] / 1e6:.1f} M", minutes + more, losses])
    return _table(["member", "steps", "tokens", "minutes", f"held-out loss: {' / '.join(FAMILIES)}"], rows)


def report(out: Path) -> str:
    """Measure, write premises.json and the tables of the model card; returns the tables."""
    found = measure(out)
    write_json(out / "premises.json", found)
    training = {name: json.loads((out / name / "training.json").read_text(encoding="utf-8")) for name in RECIPES}
    text = tables(found, training)
    card = out / "README.md"
    if card.exists():
        before, _, rest = card.read_text(encoding="utf-8").partition(BEGIN)
        if not rest:
            raise ValueError(f"{card} has no line {BEGIN!r}")
        after = rest.partition(END)[2]
        card.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return text
