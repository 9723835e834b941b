"""The HELIOS controller: evaluate candidates live, load greedily, count breaches, deepen or switch, re-assess.

After "HELIOS: Adaptive Model And Early-Exit Selection for Efficient LLM Inference Serving" (arXiv 2504.10724, section
4, Algorithm 1). Where the paper is silent the default is ours and every such point is a parameter; docs/assumptions.md
lists them. The controller sees outcomes only: no true length, no future exit, no task label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from heliosim.errors import InputError, UnknownNameError, about
from heliosim.serving.changes import Change
from heliosim.serving.controller import Controller, Note
from heliosim.serving.kinds import Context, check_exit_numbers
from heliosim.serving.repository import (
    Evaluation,
    Limits,
    Objective,
    Performance,
    PhtRow,
    Repository,
    Shortlist,
    scaled,
)
from heliosim.types import (
    Directive,
    ExitBatching,
    ExitRule,
    InFlight,
    Outcome,
    Placement,
    Run,
    Seconds,
    Served,
    Status,
    Stride,
)

if TYPE_CHECKING:
    from heliosim.types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True)
class HeliosParameters:
    """Every default and open point of the system (P: the paper's, C: our choice).

    ``threshold`` TH (C 0.8) · ``shortlist_by_slo``
    (C false), ``max_perplexity`` and ``longest_request`` (tokens of prompt and output; C none): what candidates must
    meet to be shortlisted · ``use_tokenizer_rule`` candidates share a vocabulary (P; without it they are taken to, as
    the paper does with Llama2 and Llama3; simulated only) · ``probe_requests`` live requests per candidate (P 5) ·
    ``max_candidates`` K (P 3) ·
    ``coverage`` q, share of profiled tokens the greedy depth must cover (C 0.70) · ``window_tokens`` (P 100) ·
    ``max_breaches`` CBCmax (P 50) · ``window`` kind (C sliding) · ``reassess_interval`` RI in served requests (P 150) ·
    ``probes_count`` whether evaluation requests count towards RI (C true) · ``load_step`` LD to the full model, to the
    next exit, or by kind of exits (C auto) · ``in_flight`` requests on a change (C boundary) · ``tie_tolerance``
    relative difference of costs that counts as a tie, which the cheaper (smaller) model wins (C 1 %). The
    ``use_*`` switches turn a mechanism off.
    """

    objective: Objective = "throughput"
    candidates: tuple[str, ...] = ()
    max_candidates: int = 3
    shortlist_by_slo: bool = False
    max_perplexity: float | None = None
    longest_request: int | None = None
    threshold: float = 0.8
    probe_requests: int = 5
    coverage: float = 0.70
    window: Literal["sliding", "tumbling", "none"] = "sliding"
    window_tokens: int = 100
    max_breaches: int = 50
    reassess_interval: int = 150
    probes_count: bool = True
    load_step: Literal["auto", "full", "next-exit"] = "auto"
    in_flight: InFlight = "boundary"
    batching: ExitBatching = "wait-for-deepest"
    skipped_kv: str = "propagate"
    quorum: int = 1
    break_even: float | None = None
    tie_tolerance: float = 0.01
    use_evaluation: bool = True
    use_greedy_depth: bool = True
    use_load: bool = True
    use_switch: bool = True
    use_reassess: bool = True
    use_tokenizer_rule: bool = True

    def __post_init__(self) -> None:
        least = {
            "max_candidates": 1,
            "longest_request": 1,
            "probe_requests": 1,
            "window_tokens": 1,
            "max_breaches": 0,
            "reassess_interval": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) is not None and getattr(self, name) < smallest:
                problem = f"must be at least {smallest}"
                raise InputError(f"controller.{name}", getattr(self, name), problem, "Correct the value.")
            if getattr(self, name) is not None and getattr(self, name) >= 2**31:
                raise InputError(f"controller.{name}", getattr(self, name), "must be less than 2^31", "Give less.")
        check_exit_numbers(self.batching, self.quorum, self.break_even)
        if self.max_perplexity is not None and not self.max_perplexity >= 1:  # NaN fails too
            problem = "no perplexity is below 1"
            raise InputError("controller.max_perplexity", self.max_perplexity, problem, "Correct it or leave it out.")
        if not 0 <= self.tie_tolerance < 10:
            raise InputError("controller.tie_tolerance", self.tie_tolerance, "must be 0 or a share", "Try 0.01.")
        for name in ("threshold", "coverage"):
            if not 0 <= getattr(self, name) <= 1:
                problem = "must lie between 0 and 1"
                raise InputError(f"controller.{name}", getattr(self, name), problem, "Correct the value.")

    def rule(self, kind: Literal["greedy", "threshold"]) -> ExitRule:
        """How tokens leave a partial model (``greedy``) or a full one."""
        return ExitRule(kind, self.threshold, self.batching, self.skipped_kv, self.quorum, self.break_even or 0.0)

    def build(self, context: Context) -> Controller:
        """A controller over the repository's candidates, offline figures taken at this threshold."""
        for name in self.candidates:
            if name not in context.models:
                raise UnknownNameError("controller.candidates", name, context.models)
        chosen = self
        if self.break_even is None and self.batching == "rebatch":  # what pays for every candidate
            models = self.candidates or tuple(context.models)
            chosen = replace(self, break_even=max(context.break_even(m, self.rule("threshold")) for m in models))
        return Helios(context.repository(self.threshold, self.batching), chosen)


class BreachCounter:
    """Confidence breaches (CBC) over a window of tokens: the last ``tokens`` (sliding), consecutive groups (tumbling)
    or all (none).
    """

    def __init__(self, kind: Literal["sliding", "tumbling", "none"], tokens: int) -> None:
        self.kind, self.tokens = kind, tokens
        self.reset()

    def reset(self) -> None:
        self._window: Ints = np.zeros(0, dtype=np.int64)
        self.count = 0

    def copy(self) -> BreachCounter:
        """Another counter that stands where this one does."""
        other = BreachCounter(self.kind, self.tokens)
        other.count, other._window = self.count, self._window
        return other

    def add(self, is_breach: bool) -> None:
        self.add_all(np.array([is_breach]))

    def add_all(self, breaches: Bools, limit: int | None = None) -> int | None:
        """Count tokens in order, [n], and stop behind the first that makes the count exceed ``limit``: its index."""
        if not len(breaches):
            return None
        counts = self.counts(breaches)
        stop = None
        if limit is not None and int(counts.max()) > limit:
            stop = int((counts > limit).argmax())
            breaches, counts = breaches[: stop + 1], counts[: stop + 1]
        self.take(breaches, int(counts[-1]))
        return stop

    def counts(self, breaches: Bools) -> Ints:
        """What the counter would say behind each of these tokens, [n]; nothing changes."""
        if self.kind == "none":
            return self.count + np.add.accumulate(breaches, dtype=np.int64)
        known = len(self._window)
        everything = np.concatenate((self._window, breaches))
        total = np.add.accumulate(everything)
        if self.kind == "tumbling":
            starts = np.arange(len(everything)) // self.tokens * self.tokens
            before = np.where(starts > 0, total[np.maximum(starts, 1) - 1], 0)
            return np.asarray((total - before)[known:])
        if len(total) > self.tokens:
            total[self.tokens :] -= total[: -self.tokens].copy()
        return np.asarray(total[known:])

    def may_exceed(self, limit: int, more: int) -> bool:
        """Whether ``more`` breaches could make the count exceed ``limit``."""
        return self.count + more > limit

    def take(self, breaches: Bools, count: int) -> None:
        """Remember tokens, [n], behind which the counter says ``count``."""
        self.count = count
        if self.kind == "none":
            return
        if self.kind == "sliding":
            if len(breaches) >= self.tokens:
                self._window = breaches[len(breaches) - self.tokens :].astype(np.int64)
            else:
                kept = self._window[max(0, len(self._window) + len(breaches) - self.tokens) :]
                self._window = np.concatenate((kept, breaches.astype(np.int64)))
        else:  # the group that is not yet full; a full one lasts until the next token
            everything = np.concatenate((self._window, breaches))
            self._window = np.asarray(everything[(max(0, len(everything) - 1) // self.tokens) * self.tokens :])


@dataclass(frozen=True)
class BreachGuard:
    """Trips at the step in which the counter, as it stands now, would exceed its limit."""

    counter: BreachCounter
    threshold: float
    limit: int

    def first_trip(self, confidences: Floats, ends: Ints) -> int | None:
        """confidences: [tokens]; ends: [steps], tokens up to each step's end."""
        breaches = confidences < self.threshold
        if not self.counter.may_exceed(self.limit, int(np.count_nonzero(breaches))):
            return None
        counts = self.counter.counts(breaches)
        if int(counts.max()) <= self.limit:
            return None
        return int(np.searchsorted(ends, int((counts > self.limit).argmax()), side="right"))

    def watch(self) -> BreachWatch:
        return BreachWatch(self)


class BreachWatch:
    """A guard told of steps bit by bit; asked to count only when a bound says that the limit may be passed."""

    def __init__(self, guard: BreachGuard) -> None:
        self.threshold, self._limit, self._counter = guard.threshold, guard.limit, guard.counter.copy()
        self._most = self._counter.count

    def is_safe(self, low: int) -> bool:
        """Whether steps with ``low`` tokens below the threshold cannot trip it, whatever their order."""
        if self._most + low > self._limit:
            return False
        self._most += low
        return True

    def first_trip(self, confidences: Floats, ends: Ints) -> int | None:
        """As ``BreachGuard.first_trip``, of all steps behind those shown to this method before."""
        breaches = confidences < self.threshold
        counts = self._counter.counts(breaches)
        self._counter.take(breaches, int(counts[-1]))
        self._most = self._counter.count
        if int(counts.max()) <= self._limit:
            return None
        return int(np.searchsorted(ends, int((counts > self._limit).argmax()), side="right"))


@dataclass
class Helios:
    """Controller state: the candidates, their table rows, and the directive now in force."""

    repository: Repository
    parameters: HeliosParameters = field(default_factory=HeliosParameters)

    def __post_init__(self) -> None:
        p = self.parameters
        self.shortlist = shortlisted(self.repository, p)
        self.candidates = self.shortlist.names
        self.table: dict[str, tuple[PhtRow, PhtRow]] = {}
        self.counter = BreachCounter(p.window, p.window_tokens)
        self._guard = BreachGuard(self.counter, p.threshold, p.max_breaches)
        self._trail: list[int] = []
        self._directive: Directive
        self._notes: list[Note] = []
        self._evaluating: int | None = None
        self._evaluation = Evaluation()
        self._probes_started = 0
        self._is_draining = False
        self._served_since = 0
        self._tokens_since = 0
        refused = dict(self.shortlist.refused)
        self._note("shortlist", candidates=self.candidates, objective=p.objective, refused=refused)
        self._begin()

    # -- protocol -------------------------------------------------------------------------------------------------

    @property
    def breaches(self) -> int:
        return self.counter.count

    def breaches_over(self, steps: int) -> Sequence[int]:
        return [*self._trail, *[self.counter.count] * (steps - len(self._trail))]

    def decide(self, now: Seconds, status: Status) -> Directive:
        if self._evaluating is None:
            left = self._served_left()
            if left != self._directive.max_ends:
                is_due = left is not None and left <= 0  # as soon as a step was done
                self._directive = replace(self._directive, max_ends=left, max_steps=1 if is_due else None)
            return self._directive
        name = self.candidates[self._evaluating]
        spec = self.repository.candidates[name].spec
        if status.placement == Placement(name, spec.layers) and not status.running and not status.interrupted:
            self._is_draining = False  # nobody is left from before: what is measured now is the candidate alone
        return Directive(
            placement=Placement(name, spec.layers),
            exits=self.parameters.rule("threshold"),
            in_flight=self.parameters.in_flight,
            admit=0 if self._is_draining else self.parameters.probe_requests - self._probes_started,
            is_probe=not self._is_draining,
            reason="evaluate",
            max_steps=None,
            max_ends=None if self._is_draining else self.parameters.probe_requests - self._evaluation.served,
            passes_arrivals=True,
        )

    def observe(self, now: Seconds, run: Run, outcome: Outcome, served: Sequence[Served], started: int) -> None:
        self._trail = []
        for record in served:
            if self.parameters.probes_count or not record.is_probe:
                self._served_since += 1
                self._tokens_since += record.output_tokens
        if self._evaluating is not None:
            self._observe_probe(run, outcome, served, started)
            return
        is_counting = run.exits.kind == "greedy" and run.placement == self._directive.placement
        before = self._count_before(outcome.stride) if is_counting and outcome.stride is not None else 0
        if self._is_reassessment_due():
            self._start_evaluation()
        elif is_counting:
            self._count_last(outcome, before)

    def take_notes(self) -> list[Note]:
        notes, self._notes = self._notes, []
        return notes

    # -- step 1: shortlist ----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Evaluate the candidates, or choose among them on offline figures."""
        if self.parameters.use_evaluation:
            self._start_evaluation()
        else:
            self._served_since = self._tokens_since = 0
            self._fill_from_repository()
            self._choose("choose")

    def changed(self, now: Seconds, change: Change) -> None:
        """Memory, SLO or objective are others now: shortlist from the whole repository, and begin anew."""
        before = self.candidates
        self.parameters = p = changed_by(change, self.parameters)
        self.repository = change.repository(p.threshold, p.batching)
        self.shortlist = shortlisted(self.repository, p)
        self.candidates, self.table = self.shortlist.names, {}
        self._note(
            "reshortlisted",
            candidates=self.candidates,
            before=before,
            objective=p.objective,
            refused=dict(self.shortlist.refused),
            because=dict(change.detail),
        )
        self._begin()

    def check_changes(self, changes: Sequence[Change]) -> None:
        """Raise InputError if some change leaves no candidate."""
        p = self.parameters
        for change in changes:
            with about(f"changes at {change.at_s:g} s"):
                p = changed_by(change, p)
                shortlisted(change.repository(p.threshold, p.batching), p)

    # -- step 2: evaluate -----------------------------------------------------------------------------------------

    def _start_evaluation(self) -> None:
        self._evaluating = 0
        self._served_since = 0
        self._tokens_since = 0
        self._begin_candidate()

    def _begin_candidate(self) -> None:
        self._evaluation = Evaluation()
        self._probes_started = 0
        self._is_draining = True
        self.counter.reset()

    def _observe_probe(self, run: Run, outcome: Outcome, served: Sequence[Served], started: int) -> None:
        assert self._evaluating is not None
        if not run.is_probe or self._is_draining:
            return  # requests from before are still being served
        self._probes_started += started
        if outcome.stride is None:
            self._evaluation.add_step(outcome.seconds, outcome.tokens, outcome.energy_j)
        else:
            self._evaluation.add_stride(outcome.stride)
        for record in served:
            if record.is_probe:
                self._evaluation.add_served(record)
        if self._evaluation.served < self.parameters.probe_requests:
            return
        self._fill_table(self.candidates[self._evaluating])
        self._evaluating += 1
        if self._evaluating < len(self.candidates):
            self._begin_candidate()
        else:
            self._evaluating = None
            self._choose("choose")

    def _fill_table(self, name: str) -> None:
        """PHT rows for M as measured and for M' scaled by the repository's offline ratio."""
        candidate = self.repository.candidates[name]
        live, shares = self._evaluation.performance(), self._evaluation.shares()
        depth = candidate.greedy_depth(shares, self.parameters.coverage)
        full = candidate.spec.layers
        partial = scaled(live, candidate.offline[full], candidate.offline[depth])
        self.table[name] = (self._row(name, full, live), self._row(name, depth, partial))
        self._note(
            "evaluated",
            model=name,
            requests=self._evaluation.served,
            tokens=self._evaluation.tokens,
            exits={str(k): v for k, v in shares.items()},
            greedy_depth=depth,
            throughput_tok_per_s=live.throughput_tok_per_s,
            ttft_s=live.ttft_s,
            perplexity=live.perplexity,
            partial_throughput_tok_per_s=partial.throughput_tok_per_s,
            standard_error=self._evaluation.standard_errors(),
        )

    def _fill_from_repository(self) -> None:
        """Without live evaluation the table holds the offline figures."""
        for name in self.candidates:
            candidate = self.repository.candidates[name]
            depth = candidate.greedy_depth(candidate.offline_exits, self.parameters.coverage)
            full = candidate.spec.layers
            self.table[name] = (
                self._row(name, full, candidate.offline[full]),
                self._row(name, depth, candidate.offline[depth]),
            )

    def _row(self, name: str, depth: int, performance: Performance) -> PhtRow:
        spec = self.repository.candidates[name].spec
        return PhtRow(Placement(name, depth), performance, depth < spec.layers, spec.weights_bytes(depth))

    # -- step 3: choose -------------------------------------------------------------------------------------------

    def _best(self, rows: Sequence[PhtRow]) -> PhtRow:
        """Lowest cost; among those within the tie tolerance the one with the smallest weights."""
        objective = self.parameters.objective
        lowest = min(row.performance.cost(objective) for row in rows)
        tied = [r for r in rows if r.performance.cost(objective) <= lowest * (1 + self.parameters.tie_tolerance)]
        return min(tied, key=lambda r: (r.weights_bytes, r.placement.model))

    def _choose(self, reason: str) -> None:
        column = 1 if self.parameters.use_greedy_depth else 0
        best = self._best([rows[column] for rows in self.table.values()])
        self._direct(best.placement, reason)

    def _direct(self, placement: Placement, reason: str) -> None:
        spec = self.repository.candidates[placement.model].spec
        is_partial = placement.depth < spec.layers
        kind: Literal["greedy", "threshold"] = "greedy" if is_partial else "threshold"
        self._directive = Directive(
            placement=placement,
            exits=self.parameters.rule(kind),
            in_flight=self.parameters.in_flight,
            reason=reason,
            max_steps=None,
            guard=self._guard if is_partial else None,
            passes_arrivals=True,
        )
        self.counter.reset()
        self._note(reason, placement=str(placement))

    # -- step 5: breach -------------------------------------------------------------------------------------------

    def _count_before(self, stride: Stride) -> int:
        """Count the tokens of all steps of a stride but the last: the guard saw to it that none needs a reaction.

        Returns how many there were.
        """
        if len(stride.steps) == 1:
            return 0
        assert stride.tokens is not None
        ends = stride.token_ends()[:-1]
        before = stride.tokens.confidences[: ends[-1]] < self.parameters.threshold
        counts = np.empty(len(before) + 1, dtype=np.int64)
        counts[0], counts[1:] = self.counter.count, self.counter.counts(before)
        self._trail = counts[ends].tolist()
        self.counter.take(before, self._trail[-1])
        return int(ends[-1])

    def _count_last(self, outcome: Outcome, before: int) -> None:
        """Count the tokens of the last step, behind ``before`` others of its stride, and react where the limit is
        passed.
        """
        stride = outcome.stride
        seen: Any = outcome.tokens.confidences
        if stride is not None:
            assert stride.tokens is not None
            seen = stride.tokens.confidences[before:]
        breaches = np.asarray(seen) < self.parameters.threshold
        if self.counter.add_all(breaches, self.parameters.max_breaches) is not None:
            self._react()

    def _react(self) -> None:
        """Load more layers or switch to another candidate's partial model, whichever is expected to cost less."""
        options: dict[str, tuple[Placement, float]] = {}
        if self.parameters.use_load:
            deeper = self._deeper()
            options["load"] = (deeper, self._cost_of(deeper))
        if self.parameters.use_switch:
            others = [rows[1] for name, rows in self.table.items() if name != self._directive.placement.model]
            if others:
                target = min(others, key=lambda r: (self._cost_of(r.placement), r.weights_bytes)).placement
                options["switch"] = (target, self._cost_of(target))
        breaches = self.counter.count
        self.counter.reset()
        if not options:
            self._note("breach", breaches=breaches, reaction="none")
            return
        reaction = min(options, key=lambda k: (options[k][1], k))
        costs: Mapping[str, float] = {k: cost for k, (_, cost) in options.items()}
        self._note("breach", breaches=breaches, reaction=reaction, costs=costs)
        self._direct(options[reaction][0], reaction)

    def _deeper(self) -> Placement:
        here = self._directive.placement
        spec = self.repository.candidates[here.model].spec
        step = self.parameters.load_step
        if step == "full" or (step == "auto" and spec.kind == "fixed"):
            return Placement(here.model, spec.layers)
        return Placement(here.model, min(e for e in (*spec.exits, spec.layers) if e > here.depth))

    def _cost_of(self, placement: Placement) -> float:
        """Objective of a placement, raised by the share that its load adds to the time left until re-assessment.

        For throughput this is seconds per token plus load seconds per remaining token.
        """
        performance = self._performance(placement)
        per_token_s = performance.cost("throughput")
        left = max(1, self.parameters.reassess_interval - self._served_since)
        tokens_per_request = self._tokens_since / max(1, self._served_since) or 1.0
        horizon_s = left * tokens_per_request * per_token_s
        load_s = self.repository.load_seconds(self._directive.placement, placement)
        return performance.cost(self.parameters.objective) * (1 + load_s / horizon_s)

    def _performance(self, placement: Placement) -> Performance:
        full, partial = self.table[placement.model]
        if placement == full.placement:
            return full.performance
        if placement == partial.placement:
            return partial.performance
        offline = self.repository.candidates[placement.model].offline
        return scaled(full.performance, offline[full.placement.depth], offline[placement.depth])

    # -- step 6: re-assess ----------------------------------------------------------------------------------------

    def _is_reassessment_due(self) -> bool:
        left = self._served_left()
        return left is not None and left <= 0

    def _served_left(self) -> int | None:
        """Requests to be served until re-assessment; None: there is none."""
        p = self.parameters
        if not (p.use_reassess and p.use_evaluation):
            return None
        return p.reassess_interval - self._served_since

    def _note(self, kind: str, **detail: object) -> None:
        self._notes.append(Note(kind, detail))


def changed_by(change: Change, parameters: HeliosParameters) -> HeliosParameters:
    """The parameters from a change on."""
    objective = change.objective or parameters.objective
    perplexity = parameters.max_perplexity if change.max_perplexity is None else change.max_perplexity
    return replace(parameters, objective=objective, max_perplexity=perplexity)


def shortlisted(repository: Repository, p: HeliosParameters) -> Shortlist:
    """The candidates, which must meet the scenario's SLO where it counts, and the controller's own floors.

    Raises InputError if there are none, or the objective needs figures the profile does not have.
    """
    own = repository.limits
    if p.shortlist_by_slo and own.ttft_s is None and own.tpot_s is None:
        problem = "has no effect: the scenario's slo limits neither TTFT nor TPOT"
        raise InputError("controller.shortlist_by_slo", True, problem, "Give slo.ttft_ms or slo.tpot_ms.")
    limits = Limits(
        own.ttft_s if p.shortlist_by_slo else None,
        own.tpot_s if p.shortlist_by_slo else None,
        p.max_perplexity,
        p.longest_request,
    )
    found = repository.shortlist(
        p.objective, p.max_candidates, p.candidates, limits, one_vocabulary=p.use_tokenizer_rule
    )
    if not found.names:
        raise InputError(
            "controller.candidates",
            list(p.candidates) or "all",
            f"no candidate fits the memory budget of {repository.budget_bytes:,} B fully loaded and what is "
            f"asked of it: {'; '.join(found.explain())}",
            "Raise memory.budget_bytes or the limits, or name a smaller model.",
        )
    rows = [row for name in found.names for row in repository.candidates[name].offline.values()]
    if p.objective == "energy" and any(row.energy_j is None for row in rows):
        problem = "the profile has no energy figures"
        raise InputError("controller.objective", "energy", problem, "Use another objective.")
    return found
