"""Search of scenario fields for an objective under limits, with Optuna.

Trials are asked for and told in fixed batches, and each trial's draws have a seed of their own, made of the study's
seed and the trial's number. So what is tried next depends on the study's contents alone: neither on the number of
workers nor on whether the search was stopped in between. Every trial is the mean over the same seeds (common random
numbers).
A scenario that cannot run is a failed trial; one that breaks a limit is complete and infeasible.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heliosim.errors import HelioSimError, InputError
from heliosim.executors import LostWorkError, run_all
from heliosim.formats.files import sha256_of
from heliosim.formats.tune import Range, TuneFile, load_tune
from heliosim.metrics import SCALARS
from heliosim.replicated import is_refused
from heliosim.scenario import Scenario, load_scenario
from heliosim.stats import Difference, Interval, paired_difference, t_interval
from heliosim.streams import replication_seed, stream
from heliosim.sweep import Done, Job, most, open_once, profiles_digest, run_job
from heliosim.vary import Plain, changed_at, check_against, checked, plain_scenario, resolved

STUDY = "heliosim"
MARK = "tune.json"
SATURATED = "saturated"
CONSTRAINTS = "constraints"
"""Optuna's name for how far the limits are broken."""
MOST_VERIFIED = 3
Key = tuple[str, str]
"""What a measurement depends on besides its seeds: scenario hash and digest of its profiles."""


@dataclass(frozen=True)
class Problem:
    """A tune file with its base scenario, read and checked."""

    file: TuneFile
    path: Path
    base: Scenario
    plain: Plain
    profile_hash: str
    files: Mapping[str, str | None]
    """Digests of profiles and traces to choose from, by name; None: it cannot be read."""

    @property
    def digest(self) -> str:
        """Of all that a study's trials depend on; how many there are is not part of it."""
        content = self.file.model_dump(mode="json", exclude={"trials", "fresh_seeds", "base"})
        content |= {"scenario": self.base.hash, "profile": self.profile_hash}
        content |= {"files": dict(self.files)} if self.files else {}
        text = json.dumps(content, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def scenario(self, values: Mapping[str, Any], where: str) -> Scenario:
        """The base scenario with these values. Raises InputError."""
        scenario = checked(changed_at(self.plain, values, where), where)
        check_against(scenario, open_once, where)
        return scenario

    @property
    def watches_growth(self) -> bool:
        """Whether objective or limits speak of figures that a saturated system does not have."""
        return any(is_refused(name) for name in (self.file.objective.metric, *self.file.constraints))


@dataclass(frozen=True)
class Measured:
    """What a scenario gave over a set of seeds. ``error``: why it has no figures."""

    runs: tuple[Done, ...] = ()
    error: str | None = None

    def values(self, metric: str) -> list[float | None]:
        return [run.metrics.get(metric) for run in self.runs]

    def interval(self, metric: str) -> Interval:
        """Mean over the seeds with its 95 % interval."""
        return t_interval(self.values(metric))

    def mean(self, metric: str) -> float | None:
        """None unless every seed has a value."""
        values = self.values(metric)
        return None if not values or None in values else self.interval(metric).mean

    @property
    def saturated(self) -> int:
        """How many of the runs are saturated; 0 unless more than half are."""
        found = [run.saturated for run in self.runs]
        return sum(found) if most(found) else 0


@dataclass(frozen=True)
class Verified:
    """A trial measured again with fresh seeds. ``broken``: limits it does not keep there, and metrics asked for that
    have no value. ``gain``: its objective less the base scenario's over the same seeds; None if one of them cannot run.
    """

    number: int
    values: Mapping[str, Any]
    scenario: Scenario
    measured: Measured
    base: Measured | None
    broken: tuple[str, ...]
    gain: Difference | None


def open_problem(path: Path) -> Problem:
    """Read a tune file and its base. Raises InputError naming file and field."""
    file = load_tune(path)
    base = load_scenario(path.parent / file.base)
    ranges = {}
    for name, given in file.search.items():
        choices = tuple(resolved(name, choice, path.parent) for choice in given.choices)
        ranges[name] = given.model_copy(update={"choices": choices})
    file = file.model_copy(update={"search": ranges})
    problem = Problem(file, path, base, plain_scenario(base), profiles_digest(base), _file_digests(ranges))
    for name, given in ranges.items():
        _require_possible(problem, name, given)
    return problem


def _file_digests(ranges: Mapping[str, Range]) -> dict[str, str | None]:
    named = {n for path, given in ranges.items() for choice in given.choices for n in _named_files(path, choice)}
    return {name: _file_digest(field, name) for field, name in sorted(named)}


def _named_files(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Profiles and traces that a value names, itself or somewhere inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from _named_files(f"{path}.{key}", one)
    field = path.rpartition(".")[2]
    if isinstance(value, str) and field in ("profile", "trace"):
        yield field, value


def _file_digest(field: str, name: str) -> str | None:
    try:
        return open_once(name).hash if field == "profile" else sha256_of(Path(name))
    except (InputError, OSError):
        return None  # its trials fail and say why


def _require_possible(problem: Problem, name: str, given: Range) -> None:
    """Refuse a range neither of whose ends (none of whose choices) the base scenario takes. Others may depend on what
    else a trial sets; such trials fail and say why.
    """
    refusals = []
    for value in given.choices or (given.low, given.high):
        where = f"{problem.path}, search.{name} = {value!r}"
        try:
            checked(changed_at(problem.plain, {name: value}, where), where)
            return
        except InputError as error:
            refusals.append(error)
    raise refusals[0]


def need_optuna() -> Any:
    """The module, quiet. Raises HelioSimError if it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise HelioSimError("tune needs the package optuna: install it with  pip install 'heliosim[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(problem: Problem, storage: str) -> Any:
    """The study in a storage, made if it is not there. ``storage``: a URL of a database, or ``journal:PATH``.

    Raises InputError if the study there is of another search.
    """
    need_optuna()
    try:
        study = _found_or_made(problem, _opened(storage))
    except _storage_errors() as error:
        said = without_password(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        remedy = "Give a database URL such as sqlite:///study.db, or journal:PATH; remove a file that is damaged."
        shown = without_password(storage)
        raise InputError("--storage", shown, f"it cannot be opened: {said}", remedy) from None
    if study.user_attrs.get("digest") != problem.digest:
        what = "its study is of another search: tune file, base scenario or profile changed"
        remedy = "Choose another --out, or with --storage another storage; or remove the study."
        raise InputError(without_password(storage), STUDY, what, remedy)
    return study


def _found_or_made(problem: Problem, opened: Any) -> Any:
    optuna = need_optuna()
    if STUDY in optuna.study.get_all_study_names(opened):
        return optuna.load_study(storage=opened, study_name=STUDY)
    direction = "maximize" if problem.file.objective.is_maximised else "minimize"
    study = optuna.create_study(storage=opened, study_name=STUDY, direction=direction)
    study.set_user_attr("digest", problem.digest)
    return study


def _opened(storage: str) -> Any:
    if storage.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(storage.removeprefix("journal:")))
    from optuna.storages import RDBStorage

    return RDBStorage(storage)


def _storage_errors() -> tuple[type[Exception], ...]:
    """What Optuna raises for a storage that cannot be used: the address, the driver, the database, its content."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (
        ValueError,
        ImportError,
        OSError,
        KeyError,
        AssertionError,
        RuntimeError,
        SQLAlchemyError,
        StorageInternalError,
    )


def without_password(text: str) -> str:
    """A storage's address, or what is said of it, with the password left out."""
    return re.sub(r"(://[^\s:/@]*):[^\s/]*@", r"\1:***@", text)


# --- searching ----------------------------------------------------------------------------------------------


def search(
    problem: Problem,
    study: Any,
    executor: Executor,
    *,
    trials: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Bring the study to so many trials. Interrupted, it can be called again and goes on with the same trials."""
    wanted = trials or problem.file.trials
    known: dict[Key, Measured] = {}
    while True:
        all_trials = study.get_trials(deepcopy=False)
        finished = sum(t.state.is_finished() for t in all_trials)
        if on_progress is not None:
            on_progress(min(finished, wanted), wanted)
        if finished >= wanted:
            return
        first = finished - finished % problem.file.batch
        batch = [_ask(problem, study, n) for n in range(finished, min(first + problem.file.batch, wanted))]
        measured = evaluate(problem, [values for _, values in batch], range(problem.file.seeds), executor, known)
        for (trial, _), one in zip(batch, measured, strict=True):
            _tell(problem, study, trial, one)


def _ask(problem: Problem, study: Any, number: int) -> tuple[Any, dict[str, Any]]:
    """Trial ``number`` with its values; taken up again if it was asked for and never told."""
    optuna = need_optuna()
    seed = int(stream(problem.file.seed, "tune", number).integers(2**32))
    makes = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    study.sampler = makes[problem.file.sampler](seed=seed)
    left = [t for t in study.get_trials(deepcopy=False) if t.number == number]
    if left and left[0].state != optuna.trial.TrialState.WAITING:
        trial = optuna.trial.Trial(study, left[0]._trial_id)
    else:
        if number == 0 and not left:
            study.enqueue_trial(base_values(problem))
        trial = study.ask()
    return trial, {name: _suggest(trial, name, given) for name, given in problem.file.search.items()}


def _suggest(trial: Any, name: str, given: Range) -> Any:
    if given.choices:
        texts = [_choice(c) for c in given.choices]
        return given.choices[texts.index(trial.suggest_categorical(name, texts))]
    if given.is_whole:
        return trial.suggest_int(name, given.low, given.high, step=given.step or 1, log=given.log)
    return trial.suggest_float(name, given.low, given.high, step=given.step, log=given.log)


def _choice(value: Any) -> Any:
    """A choice as Optuna stores it: plain values as they are, others as JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value, sort_keys=True)


def base_values(problem: Problem) -> dict[str, Any]:
    """The base scenario's own values of searched fields, where they lie in the range: the first trial."""
    full = problem.base.model_dump(mode="json")
    kind = problem.base.controller_kind()
    full["controller"] = {**json.loads(json.dumps(asdict(kind), default=list)), **problem.base.controller}  # type: ignore[call-overload]
    values = {}
    for name, given in problem.file.search.items():
        value: Any = full
        for part in name.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = value.get(part) if isinstance(value, dict) else None
        if name == "controller.candidates" and not value:
            value = list(problem.base.models)  # none named: all
        if given.holds(value):
            values[name] = _choice(value)
    return values


def evaluate(
    problem: Problem,
    candidates: Sequence[Mapping[str, Any]],
    replications: range,
    executor: Executor,
    known: dict[Key, Measured] | None = None,
) -> list[Measured]:
    """Each candidate over the replications' seeds. ``known``: what was measured before over these."""
    known = {} if known is None else known
    results: dict[int, Measured] = {}
    scenarios: dict[int, Scenario] = {}
    for index, values in enumerate(candidates):
        try:
            scenarios[index] = problem.scenario(values, "trial")
        except InputError as error:
            results[index] = Measured(error=str(error))
    keys = {index: (scenario.hash, profiles_digest(scenario)) for index, scenario in scenarios.items()}
    new = {keys[index]: scenario for index, scenario in scenarios.items() if keys[index] not in known}
    jobs = [_job(problem, scenario, r) for scenario in new.values() for r in replications]
    done: dict[int, Done] = {}
    try:
        run_all(executor, run_job, jobs, lambda index, one: done.__setitem__(index, one))
    except LostWorkError as lost:
        done |= {i: Done(error=f"the worker died {lost.tries} times") for i in lost.indices}
    for place, key in enumerate(new):
        runs = tuple(done[place * len(replications) + k] for k in range(len(replications)))
        failed = next((run.error for run in runs if run.error is not None), None)
        known[key] = Measured(error=failed) if failed else Measured(runs)
    return [results[i] if i in results else known[keys[i]] for i in range(len(candidates))]


def _job(problem: Problem, scenario: Scenario, replication: int) -> Job:
    seeded = scenario.model_copy(update={"seed": replication_seed(scenario.seed, replication)})
    profile_hash = profiles_digest(scenario)
    slo = problem.file.slo or scenario.slo
    return Job(0, replication, seeded, profile_hash, "", problem.file.after_s, slo)


def excesses(problem: Problem, measured: Measured) -> dict[str, float]:
    """How far each limit is broken (0 or less: kept), relative to it. Raises InputError if a metric has no value."""
    found = {}
    for name, limit in problem.file.constraints.items():
        found[name] = limit.excess(_value(measured, name))
    if problem.watches_growth:
        found[SATURATED] = float(measured.saturated)
    return found


def _value(measured: Measured, metric: str) -> float:
    value = measured.mean(metric)
    if value is None:
        raise InputError(metric, None, "the metric has no value in this scenario", "It may need an slo, or energy.")
    return value


def _tell(problem: Problem, study: Any, trial: Any, measured: Measured) -> None:
    optuna = need_optuna()
    error = measured.error
    if error is None:
        try:
            value, broken = _value(measured, problem.file.objective.metric), excesses(problem, measured)
        except InputError as problem_found:
            error = str(problem_found)
    if error is not None:
        trial.set_user_attr("error", error)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    # Optuna's constraints as one list: samplers and dashboard both read this form
    trial.storage.set_trial_system_attr(trial._trial_id, CONSTRAINTS, list(broken.values()))
    for name in dict.fromkeys((problem.file.objective.metric, *problem.file.constraints)):
        trial.set_user_attr(name, measured.mean(name))
    trial.set_user_attr("metrics", {name: measured.mean(name) for name in SCALARS})
    study.tell(trial, value)


# --- choosing -----------------------------------------------------------------------------------------------


def broken_by(problem: Problem, trial: Any) -> dict[str, float]:
    """How far a complete trial breaks each limit, relative to it; 0 or less: it keeps it."""
    names = [*problem.file.constraints, *([SATURATED] if problem.watches_growth else [])]
    return dict(zip(names, trial.system_attrs[CONSTRAINTS], strict=True))


def is_feasible(trial: Any) -> bool:
    """Whether a finished trial keeps every limit."""
    return trial.value is not None and all(v <= 0 for v in trial.system_attrs[CONSTRAINTS])


def ranked(problem: Problem, study: Any) -> list[Any]:
    """Complete trials: feasible before infeasible, best first; of the infeasible the least broken first."""
    sign = -1.0 if problem.file.objective.is_maximised else 1.0

    def order(trial: Any) -> tuple[float, float, int]:
        return sum(v for v in trial.system_attrs[CONSTRAINTS] if v > 0), sign * trial.value, trial.number

    return sorted((t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"), key=order)


def values_of(problem: Problem, trial: Any) -> dict[str, Any]:
    """A trial's values by field, as a scenario takes them."""
    found = {}
    for name, given in problem.file.search.items():
        value = trial.params[name]
        found[name] = given.choices[[_choice(c) for c in given.choices].index(value)] if given.choices else value
    return found


def verify(problem: Problem, study: Any, executor: Executor) -> list[Verified]:
    """Measure the best feasible trials again with seeds no trial has seen, best first, until one keeps every limit (at
    most three). The last of the list is the answer if its ``broken`` is empty; no trial feasible: an empty list.
    """
    fresh = range(problem.file.seeds, problem.file.seeds + problem.file.fresh_seeds)
    known: dict[Key, Measured] = {}
    metric, found = problem.file.objective.metric, list[Verified]()
    distinct: dict[str, Any] = {}
    for trial in ranked(problem, study):
        if is_feasible(trial):
            distinct.setdefault(json.dumps(trial.params, sort_keys=True), trial)
    for trial in list(distinct.values())[:MOST_VERIFIED]:
        values = values_of(problem, trial)
        measured, base = evaluate(problem, [values, {}], fresh, executor, known)
        broken = _broken(problem, measured)
        has_pairs = measured.error is None and base.error is None
        gain = paired_difference(measured.values(metric), base.values(metric)) if has_pairs else None
        scenario = problem.scenario(values, f"trial {trial.number}")
        scenario = scenario.model_copy(
            update={"name": f"{problem.base.name}-tuned", "slo": problem.file.slo or scenario.slo}
        )
        found.append(Verified(trial.number, values, scenario, measured, base if has_pairs else None, broken, gain))
        if not broken:
            break
    return found


def _broken(problem: Problem, measured: Measured) -> tuple[str, ...]:
    """What speaks against a trial: limits it does not keep, and figures asked for that it does not have."""
    if measured.error is not None:
        return ("it fails",)
    names = dict.fromkeys((problem.file.objective.metric, *problem.file.constraints))
    missing = [name for name in names if measured.mean(name) is None]
    limits = {name: limit for name, limit in problem.file.constraints.items() if name not in missing}
    over = [name for name, limit in limits.items() if limit.excess(_value(measured, name)) > 0]
    grows = [SATURATED] if problem.watches_growth and measured.saturated else []
    return (*missing, *over, *grows)


def importance(study: Any) -> dict[str, float]:
    """Share of each parameter in what makes a trial good, by PED-ANOVA; empty with fewer than ten complete trials.

    Watanabe, Bansal and Hutter, "PED-ANOVA" (IJCAI 2023), as Optuna has it; unlike its other evaluators it needs no
    scikit-learn.
    """
    optuna = need_optuna()
    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    varied = [n for n in (complete[0].params if complete else ()) if len({str(t.params.get(n)) for t in complete}) > 1]
    if len(complete) < 10 or not varied:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.2, evaluate_on_local=False)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied))
