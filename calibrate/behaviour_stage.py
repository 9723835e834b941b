"""The behaviour stage of a calibration: from prompts and an engine to a table, in a profile or on its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliosim import __version__
from heliosim.errors import InputError
from heliosim.formats.checkpoint import CheckpointInfo
from heliosim.formats.files import sha256_of
from heliosim.formats.profile import BehaviourFacts, References
from heliosim.types import ModelSpec

from .behaviour import PROMPTS_AT_ONCE, jobs_of, observe, sources_of
from .behaviour_parts import Parts, digest_of
from .prompts import Coder, Prompt, Prompts, prompts_from_file, prompts_from_tasks

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BehaviourPlan:
    """What to observe. ``prompts_file``: None for the built-in ``tasks`` (empty: all), ``prompts_per_task`` of each.
    ``closed_loop_prompts``: prompts of each task that texts are generated behind, ``tokens_per_text`` each, under every
    policy, the ``exit_methods`` (``batching+skipped_kv``, or ``all``) included. ``rows``: batch size.
    """

    tasks: Sequence[str] = field(default_factory=tuple)
    prompts_per_task: int = 24
    prompts_file: Path | None = None
    closed_loop_prompts: int = 24
    tokens_per_text: int = 48
    threshold: float = 0.8
    exit_methods: Sequence[str] = ()
    rows: int = 16
    seed: int = 0
    at_once: int = PROMPTS_AT_ONCE

    def coder(self, infos: Mapping[str, CheckpointInfo], max_context: int) -> Coder:
        """How the models' shared vocabulary reads text."""
        first = next(iter(infos.values()))
        drawn = [name for name, info in infos.items() if info.random is not None]
        if drawn:
            remedy = "Name models with trained weights."
            raise InputError("--models", drawn[0], "random weights say nothing: they have no behaviour", remedy)
        eos = dict.fromkeys(t for info in infos.values() for t in info.eos_ids)
        return Coder(first.folder / "tokenizer.json", list(eos), max_context)

    def prompts(self, coder: Coder) -> Prompts:
        """The prompts to observe. Raises InputError where too few fit."""
        from heliosim.tasks import FAMILIES

        longest = coder.room - self.tokens_per_text
        if self.prompts_file is not None:
            return prompts_from_file(self.prompts_file, coder, longest)
        tasks = self.tasks or FAMILIES
        return Prompts(prompts_from_tasks(tasks, self.prompts_per_task, "calibration", self.seed, coder, longest))


def measure_behaviour(
    plan: BehaviourPlan,
    engine: Any,
    infos: Mapping[str, CheckpointInfo],
    coder: Coder,
    prompts: Prompts,
    path: Path,
    parts: Path,
    progress: Progress,
) -> BehaviourFacts:
    """Observe everything, part by part, and write the table to ``path``. Parts stay in the folder ``parts`` until
    then: the same call goes on from them. Raises InputError where there is nothing to observe.
    """
    specs = {name: info.spec for name, info in infos.items()}
    closed = prompts.first_of_each(plan.closed_loop_prompts)
    how = (plan.threshold, plan.tokens_per_text, plan.exit_methods, plan.at_once)
    jobs = jobs_of(specs, closed, prompts.given, *how)
    if not jobs:
        problem = "no texts are generated, and the prompts have no completions to score"
        raise InputError("--closed-loop-prompts", plan.closed_loop_prompts, problem, "Give at least 1.")
    weights = {name: info.weights_sha256() for name, info in infos.items()}
    settings = {"tokens": plan.tokens_per_text, "rows": plan.rows, "dtype": [i.dtype for i in infos.values()]}
    settings |= {"device": str(engine.device), "heliosim": __version__}
    kept = Parts(parts, digest_of(jobs, weights, settings))
    for number, job in enumerate(jobs):
        progress(job.source, number / len(jobs))
        if not kept.has(number):
            kept.keep(number, observe(engine, specs, job, coder, plan.tokens_per_text, plan.rows))
    rows = kept.join(len(jobs), path)
    return _facts(plan, specs, prompts, closed, rows)


def _facts(
    plan: BehaviourPlan, specs: Mapping[str, ModelSpec], prompts: Prompts, closed: Sequence[Prompt], rows: int
) -> BehaviourFacts:
    sources = tuple(n for s in specs.values() for n in sources_of(s, plan.threshold, plan.exit_methods))
    given = [p for p in prompts.given if p.reference]
    file = plan.prompts_file
    return BehaviourFacts(
        tasks=_by_task(closed or given),
        split="calibration" if file is None else "file",
        tokens_per_text=plan.tokens_per_text,
        threshold=plan.threshold,
        sources=sources if closed else (),
        rows=rows,
        references=References(
            tasks=_by_task(given),
            tokens=sum(len(p.reference) for p in given),
            file=None if file is None else file.name,
            sha256=None if file is None else sha256_of(file),
            passed_over=prompts.passed_over,
        ),
    )


def _by_task(prompts: Sequence[Prompt]) -> dict[str, int]:
    found: dict[str, int] = {}
    for prompt in prompts:
        found[prompt.task] = found.get(prompt.task, 0) + 1
    return found


def parts_folder(out: Path) -> Path:
    """Where the parts of a folder to be written lie until it is."""
    return out.parent / f".{out.name}.behaviour-parts"
