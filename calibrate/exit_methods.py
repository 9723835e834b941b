"""Exit batching and skipped-KV methods side by side, closed loop: every pair generates its own text, live.

Speed and quality come from the same run. Every request waits from the start and ends where the model ends it, so a
method that never comes to an end, or says other things, shows. Quality is judged by the full model: how its own greedy
text and this one part, how likely it finds this one, and whether the answers of tasks that have one are right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from heliosim.costs import shape_of
from heliosim.drive import Log
from heliosim.errors import InputError
from heliosim.exits.batching import exit_batcher
from heliosim.exits.pricing import break_even, is_plain, parts_of_run
from heliosim.exits.skipped import skipped_kv
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.formats.files import write_text
from heliosim.formats.profile import Profile
from heliosim.live import serve_live
from heliosim.recorder import NullRecorder
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import FixedPlacement
from heliosim.serving.memory import MemoryPool
from heliosim.serving.server import Server
from heliosim.types import Arrival, Content, ExitRule, ModelSpec, Request, Run
from heliosim.workload import OpenLoop

from .behaviour import right_lines
from .prompts import EXACT_TASKS


@dataclass(frozen=True)
class Asked:
    """What to compare. ``prompts`` of each task; ``rows``: batch size; ``profile``: where ``rebatch`` takes its
    break-even from (None: it regroups whenever a row has left).
    """

    model: str
    batchings: Sequence[str]
    methods: Sequence[str]
    tasks: Sequence[str]
    prompts: int = 24
    rows: int = 8
    threshold: float = 0.8
    quorum: int = 1
    max_tokens: int = 96
    repeats: int = 3
    seed: int = 0
    profile: Profile | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a task, and the completion that belongs to it."""

    task: str
    ids: tuple[int, ...]
    completion: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One pair of methods. Speed on the cpu clock, the median of the repeats; see ``docs/exit-methods.md``.

    ``predicted_per_s``: as the profile's costs have it for the same steps.

    ``layers_per_token``: layers run for each generated token, those of tokens that waited included. ``agreement``:
    share of emitted tokens that the full model would have said to the same text; ``same_prefix``: mean share of the
    full model's own text up to the first other token. ``right``: mean share of lines of the right completion that stand
    in their place, by task.
    """

    batching: str
    skipped_kv: str
    tokens_per_s: float
    predicted_per_s: float | None
    layers_per_token: float
    agreement: float
    same_prefix: float
    perplexity: float
    mean_tokens: float
    right: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """Share of right lines over all tasks that have right ones."""
        return fmean(self.right.values()) if self.right else math.nan


def compare(asked: Asked, progress: Callable[[str, float], None] = lambda _what, _share: None) -> list[Trial]:
    """Vanilla decoding first (batching ``-``), then every pair."""
    from heliosim.engines.torch import TorchEngine

    engine = TorchEngine({asked.model: checkpoint_path(asked.model)})
    spec = engine.specs[asked.model]
    prompts = _prompts(asked, spec)
    rules = [ExitRule("none")]
    for batching in asked.batchings:  # where every layer runs, nothing is skipped
        methods = asked.methods[:1] if exit_batcher(batching).runs_all else asked.methods
        rules += [_rule(asked, batching, method) for method in methods]
    _serve(engine, spec, rules[-1], prompts[: asked.rows], asked)  # first use is nobody's
    seconds: list[list[float]] = [[] for _ in rules]
    served: list[_Served] = []
    for k in range(asked.repeats):  # in turns: what else happens on the machine meets all alike
        for i, rule in enumerate(rules):
            progress(f"{rule.batching}, {rule.skipped_kv}", (k * len(rules) + i) / (asked.repeats * len(rules)))
            done = _serve(engine, spec, rule, prompts, asked)
            seconds[i].append(done.seconds)
            if not k:
                served.append(done)
    return [
        _judged(engine, asked, rule, prompts, done, served[0], median(took))
        for rule, done, took in zip(rules, served, seconds, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Served:
    """``outputs`` by prompt; ``work``: tokens x layers of generated tokens; ``seconds`` of all steps, and as a profile
    predicts them from what happened (None: without one).
    """

    outputs: list[list[int]]
    seconds: float
    work: int
    predicted_s: float | None


def _rule(asked: Asked, batching: str, method: str) -> ExitRule:
    rule = ExitRule("threshold", asked.threshold, batching, method, asked.quorum)
    if batching != "rebatch" or asked.profile is None:
        return rule
    cost = asked.profile.step_cost(asked.model, asked.profile.clock())
    return ExitRule(
        "threshold", asked.threshold, batching, method, asked.quorum, break_even(cost, rule, cost.max_context // 2)
    )


def _prompts(asked: Asked, spec: ModelSpec) -> list[Prompt]:
    """Held-out prompts, one task after the other in turns, that leave room for ``max_tokens``."""
    from heliosim.synth import load_tokenizer
    from heliosim.tasks import documents

    file = checkpoint_path(asked.model) / "tokenizer.json"
    if not file.exists():
        raise InputError(str(file), file.name, "the checkpoint has no fast tokenizer", "Add its tokenizer.json.")
    encode = load_tokenizer(file)
    found: list[Prompt] = []
    for task in asked.tasks:
        kept = 0
        for k, document in enumerate(documents(task, "calibration", asked.seed)):
            ids = tuple(encode(document.prompt))
            if len(ids) + asked.max_tokens <= spec.max_context:
                found.append(Prompt(task, ids, document.completion))
                kept += 1
            if kept == asked.prompts:
                break
            if k > 50 * asked.prompts:
                remedy = "Lower it, or ask for fewer prompts."
                raise InputError(
                    "--max-tokens", asked.max_tokens, f"few prompts of {task!r} leave so much room", remedy
                )
    each = asked.prompts
    return [found[t * each + k] for k in range(each) for t in range(len(asked.tasks))]


def _serve(engine: Any, spec: ModelSpec, rule: ExitRule, prompts: Sequence[Prompt], asked: Asked) -> _Served:
    """All prompts through the live server, in batches of ``rows``."""
    engine.reset()
    arrivals = [
        Arrival(Request(i, 0.0, len(p.ids), asked.max_tokens), Content(p.task, p.ids, None))
        for i, p in enumerate(prompts)
    ]
    longest = max(len(p.ids) for p in prompts) + asked.max_tokens
    blocks = (longest // 16 + 2) * (asked.rows + 1)
    pool = MemoryPool(spec.weights_bytes(spec.layers) + blocks * spec.block_bytes(spec.layers))
    batcher = ContinuousBatcher(asked.rows, max(256, asked.rows))
    server = Server(FixedPlacement(spec, rule), batcher, pool, {spec.name: spec}, NullRecorder())
    log = serve_live(server, engine, OpenLoop(arrivals), "cpu").log
    outputs = engine.take_outputs()
    prompt_work = sum(len(p.ids) for p in prompts) * spec.layers
    seconds = sum(outcome.seconds for action, outcome in log if isinstance(action, Run))
    predicted = None if asked.profile is None else predicted_seconds(asked.profile, spec, log)
    return _Served([list(outputs[i]) for i in range(len(prompts))], seconds, engine.work - prompt_work, predicted)


def predicted_seconds(profile: Profile, spec: ModelSpec, log: Log) -> float:
    """What a profile's costs say the steps of a log should have taken, given where their tokens left."""
    cost, total = profile.step_cost(spec.name, profile.clock()), 0.0
    waiting: dict[int, list[int]] = {}
    for action, outcome in log:
        if not isinstance(action, Run):
            continue
        if is_plain(action.exits):
            total += cost.seconds(shape_of(action, outcome, spec))
            continue
        parts, dones = parts_of_run(action, outcome, spec, waiting)
        total += parts.seconds(cost, action.exits)
        if skipped_kv(action.exits.skipped_kv).is_recomputed:
            waiting |= zip(action.batch.requests, dones, strict=True)
    return total


def _judged(
    engine: Any, asked: Asked, rule: ExitRule, prompts: Sequence[Prompt], done: _Served, full: _Served, seconds: float
) -> Trial:
    spec = engine.specs[asked.model]
    tokens = sum(map(len, done.outputs))
    texts = [[*p.ids, *o] for p, o in zip(prompts, done.outputs, strict=True)]
    agreeing, logprob = 0, 0.0
    for prompt, output, seen in zip(
        prompts, done.outputs, engine.score(asked.model, texts, (spec.layers,)), strict=True
    ):
        window = slice(len(prompt.ids) - 1, len(prompt.ids) - 1 + len(output))
        agreeing += int((seen.ids[0, window] == output).sum())
        logprob += float(seen.logprobs[0, window].sum(dtype=float))
    is_vanilla = rule.kind == "none"
    return Trial(
        batching="-" if is_vanilla else rule.batching,
        skipped_kv="-" if is_vanilla or exit_batcher(rule.batching).runs_all else rule.skipped_kv,
        tokens_per_s=tokens / seconds,
        predicted_per_s=None if done.predicted_s is None else tokens / done.predicted_s,
        layers_per_token=done.work / max(1, tokens - len(prompts)),  # the first token comes with the prompt
        agreement=agreeing / tokens,
        same_prefix=fmean(_prefix(a, b) for a, b in zip(done.outputs, full.outputs, strict=True)),
        perplexity=math.exp(-logprob / tokens),
        mean_tokens=tokens / len(prompts),
        right=_right(asked, prompts, done.outputs, engine.hosts[asked.model].info.eos_ids),
    )


def _prefix(mine: Sequence[int], full: Sequence[int]) -> float:
    """Share of ``full`` up to the first place where ``mine`` says something else."""
    same = next((i for i, (a, b) in enumerate(zip(mine, full, strict=False)) if a != b), min(len(mine), len(full)))
    return same / len(full)


def _right(
    asked: Asked, prompts: Sequence[Prompt], outputs: Sequence[Sequence[int]], eos: Sequence[int]
) -> dict[str, float]:
    """Mean share of right lines, by task; lines too many count as wrong ones."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint_path(asked.model) / "tokenizer.json"))
    found: dict[str, list[float]] = {}
    for prompt, output in zip(prompts, outputs, strict=True):
        if prompt.task in EXACT_TASKS:
            said = tokenizer.decode([i for i in output if i not in eos])
            found.setdefault(prompt.task, []).append(right_lines(said, prompt.completion))
    return {task: fmean(shares) for task, shares in found.items()}


def weights_of(model: str) -> str:
    """Digest of the weights compared, for the page."""
    return inspect_checkpoint(checkpoint_path(model), "float32").weights_sha256()


# --- in text ----------------------------------------------------------------------------------------------------------

_HEAD = ("batching", "skipped KV", "tok/s", "layers", "agree", "prefix", "ppl", "length", "right")


def table(trials: Sequence[Trial]) -> list[str]:
    """A Markdown table of at most 80 columns."""
    rows = [
        (
            t.batching, t.skipped_kv, f"{t.tokens_per_s:.0f}", f"{t.layers_per_token:.2f}", f"{t.agreement:.1%}",
            f"{t.same_prefix:.1%}", f"{t.perplexity:.3f}", f"{t.mean_tokens:.1f}",
            "-" if math.isnan(t.accuracy) else f"{t.accuracy:.0%}",
        )
        for t in trials
    ]  # fmt: skip
    return _lines(_HEAD, rows, left=2)


def task_table(trials: Sequence[Trial]) -> list[str]:
    """Right lines by task."""
    tasks = list(trials[0].right)
    rows = [(t.batching, t.skipped_kv, *(f"{t.right[task]:.0%}" for task in tasks)) for t in trials]
    return _lines(("batching", "skipped KV", *tasks), rows, left=2)


def speed_table(trials: Sequence[Trial]) -> list[str]:
    """Speed as measured and as the profile predicts it from the same exits, by pair; empty without a profile."""
    rows = [
        (
            t.batching, t.skipped_kv, f"{t.tokens_per_s:.0f}", f"{t.predicted_per_s:.0f}",
            f"{t.predicted_per_s / t.tokens_per_s - 1:+.1%}",
        )
        for t in trials
        if t.predicted_per_s is not None
    ]  # fmt: skip
    return _lines(("batching", "skipped KV", "tok/s", "predicted", "error"), rows, left=2) if rows else []


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    shown = [head, rule, *rows]
    return [
        "|"
        + "|".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        + "|"
        for r in shown
    ]


def page_part(asked: Asked, trials: Sequence[Trial], command: str) -> str:
    """One comparison's part of ``docs/exit-methods.md``."""
    least = {m: _rule(asked, "rebatch", m).break_even for m in asked.methods if "rebatch" in asked.batchings}
    about = [
        f"weights {weights_of(asked.model)[:12]}; {asked.prompts} held-out prompts of each of {', '.join(asked.tasks)}",
        f"batch {asked.rows}, threshold {asked.threshold:g}, at most {asked.max_tokens} tokens each",
        f"speed: median of {asked.repeats} runs, cpu clock",
    ]
    if any(least.values()):
        about.append("`rebatch` regroups from so many rows x layers on: " + _listed(least))
    elif least:
        about.append("`rebatch` regroups whenever a row has left")
    lines = [f"## {title(asked)}", "", "```bash", command, "```", "", *(f"- {line}" for line in about), ""]
    lines += table(trials)
    if trials[0].right:
        lines += ["", "Right lines by task:", "", *task_table(trials)]
    if predicted := speed_table(trials):
        lines += ["", "Speed, and what the profile's costs predict for the same exits:", "", *predicted]
    return "\n".join([*lines, ""])


def _listed(least: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in least.items())


def title(asked: Asked) -> str:
    """Heading of a part: a comparison of the same model and batch replaces it."""
    return f"{asked.model}, batch {asked.rows}"


def write_part(path: Path, part: str, name: str) -> None:
    """Put a part into a page, in place of an older one of that name; what stands before the first part is kept."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Exit methods, measured\n"
    head, *parts = text.split("\n## ")
    known = [p.split("\n", 1)[0] for p in parts]
    new = part.removeprefix("## ")
    if name in known:
        parts[known.index(name)] = new
    else:
        parts.append(new)
    write_text(path, "\n## ".join(p.rstrip() + "\n" for p in (head, *parts)))
