"""Rows about directions: sweeps and ablations of the OPT pair. The paper's, and those it does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heliosim.reproduction.inputs import LARGE, SMALL
from heliosim.reproduction.rows import (
    DEFAULTS,
    Answer,
    Check,
    Experiment,
    Plot,
    Row,
    Runs,
    Series,
    Value,
    flatter,
    greater,
    samples,
    series_of,
    value_of,
)
from heliosim.reproduction.systems import ALONE_SMALL, ASSUMED, HELIOS, SIMULATED, alone, helios

RATE, PER_REQUEST, PERPLEXITY = "output_throughput", "per_request_tok_per_s", "perplexity"
THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 0.95)
INTERVALS = (50, 100, 150, 200, 250)
BREACHES = (30, 40, 50, 60, 70)
WINDOWS = (50, 100, 200, 400)
COVERAGES = (0.5, 0.6, 0.7, 0.8, 0.9)
CANDIDATES: tuple[tuple[str, list[str]], ...] = (
    ("OPT-1.3B", [SMALL]),
    ("OPT-6.7B", [LARGE]),
    ("both", [SMALL, LARGE]),
)
TOK, EACH = "tokens/s", "tokens/s, mean over requests"
"""All output tokens over all time, which decides a check, and the mean over requests of their decode rates beside it:
the paper does not say which of the two its sweeps show.
"""


def both(runs: Runs, name: str, experiment: Experiment) -> list[Value]:
    """The two rates of an experiment."""
    return [
        value_of(f"{name}: {TOK}", samples(runs, experiment, RATE)),
        value_of(f"{name}: {EACH}", samples(runs, experiment, PER_REQUEST)),
    ]


def speed(runs: Runs, name: str, experiment: Experiment) -> list[Value]:
    """The two rates of an experiment, and its perplexity."""
    return [
        *both(runs, name, experiment),
        value_of(f"{name}: perplexity", samples(runs, experiment, PERPLEXITY)),
    ]


def line(runs: Runs, name: str, xs: Sequence[float], of: Callable[[float], Experiment], metric: str = RATE) -> Series:
    return series_of(name, [(x, samples(runs, of(x), metric)) for x in xs])


def two_rates(runs: Runs, xs: Sequence[float], of: Callable[[float], Experiment]) -> tuple[Series, ...]:
    return line(runs, "all tokens", xs, of), line(runs, "mean over requests", xs, of, PER_REQUEST)


def of_threshold(system: str) -> Callable[[float], Experiment]:
    if system == "HELIOS":
        return lambda x: helios(threshold=x)
    return lambda x: alone(system == "OPT-1.3B", threshold=x)


def thresholds(runs: Runs) -> Answer:
    """Throughput against TH; the change from the lowest to the highest, relative to the lowest."""
    names = ("OPT-1.3B", "OPT-6.7B", "HELIOS")
    ends = {n: [samples(runs, of_threshold(n)(x), RATE) for x in (THRESHOLDS[0], THRESHOLDS[-1])] for n in names}
    change = {n: [b / a - 1 for a, b in zip(*ends[n], strict=True)] for n in names}
    checks = [greater(f"{n} falls as TH rises", ends[n][0], ends[n][1]) for n in names[:2]]
    checks += [flatter(f"HELIOS changes less than {n}", change["HELIOS"], change[n]) for n in names[:2]]
    return Answer(
        checks=tuple(checks),
        plots=tuple(
            Plot(title, "threshold TH", unit, tuple(line(runs, n, THRESHOLDS, of_threshold(n), m) for n in names))
            for title, unit, m in (
                ("Threshold TH", "output tokens/s", RATE),
                ("Threshold TH, per request", EACH, PER_REQUEST),
            )
        ),
        beside=(
            *(value_of(f"{n}: change from TH 0.6 to 0.95, %", [100 * x for x in change[n]]) for n in names),
            *(
                v
                for n in names
                for x in (THRESHOLDS[0], THRESHOLDS[-1])
                for v in both(runs, f"{n}, TH {x}", of_threshold(n)(x))
            ),
            *(
                value_of(f"HELIOS, TH {x}: {word}", [k * v for v in samples(runs, of_threshold("HELIOS")(x), metric)])
                for x in THRESHOLDS
                for word, metric, k in (
                    ("unsure tokens in a window of 100", "low_confidence_share", 100.0),
                    ("reactions a run", "reactions", 1.0),
                )
            ),
        ),
    )


def of_interval(x: float) -> Experiment:
    return helios(reassess_interval=int(x))


def intervals(runs: Runs) -> Answer:
    """Throughput against RI: best at 50, falling."""
    of = {x: samples(runs, of_interval(x), RATE) for x in INTERVALS}
    checks = [
        greater("RI 50 is faster than RI 150", of[50], of[150]),
        greater("RI 150 is faster than RI 250", of[150], of[250]),
        greater("RI 50 is faster than RI 250", of[50], of[250]),
    ]
    return Answer(
        checks=tuple(checks),
        plots=(Plot("Re-assessment interval RI", "requests", TOK, two_rates(runs, INTERVALS, of_interval)),),
        beside=tuple(v for x in INTERVALS for v in both(runs, f"RI {x}", of_interval(x))),
    )


SWITCH_ONLY, LOAD_ONLY = helios(use_load=False), helios(use_switch=False)


def reactions(runs: Runs) -> Answer:
    """Which reaction is allowed: speed and perplexity."""
    named = (("switch only", SWITCH_ONLY), ("both", HELIOS), ("load only", LOAD_ONLY))
    rate = {n: samples(runs, x, RATE) for n, x in named}
    ppl = {n: samples(runs, x, PERPLEXITY) for n, x in named}
    checks = (
        greater("switch only is faster than both", rate["switch only"], rate["both"]),
        greater("both is faster than load only", rate["both"], rate["load only"]),
        greater("switch only has a worse perplexity than both", ppl["switch only"], ppl["both"]),
        greater("both has a worse perplexity than load only", ppl["both"], ppl["load only"]),
    )
    return Answer(checks=checks, beside=tuple(v for n, x in named for v in speed(runs, n, x)))


SWITCHES = ("use_evaluation", "use_greedy_depth", "use_load", "use_switch", "use_reassess")


def ablations(runs: Runs) -> Answer:
    """Each mechanism off: what changes."""
    named = [("HELIOS", HELIOS), *((f"{name}: false", helios(DEFAULTS, **{name: False})) for name in SWITCHES)]
    beside = [v for name, x in named for v in speed(runs, name, x)]
    ours = samples(runs, HELIOS, RATE)
    whole = samples(runs, helios(use_greedy_depth=False), RATE)
    kept = samples(runs, helios(use_reassess=False), RATE)
    checks = (
        greater("without greedy depth it is slower", ours, whole),
        greater("without re-assessment it is slower", ours, kept),
        greater(
            "without reactions perplexity is worse than with loads only",
            samples(runs, helios(use_load=False, use_switch=False), PERPLEXITY),
            samples(runs, LOAD_ONLY, PERPLEXITY),
        ),
    )
    return Answer(checks=checks, beside=tuple(beside))


SAME = helios(candidates=(SMALL,), use_greedy_depth=False, use_evaluation=False)
TABLES = ("requests", "tokens", "steps but reason")


def identity(runs: Runs) -> Answer:
    """HELIOS with one candidate at full depth against early exit alone: the same tables, byte for byte."""
    pairs = list(zip(runs[SAME], runs[ALONE_SMALL], strict=True))
    checks = []
    for name in TABLES:
        same = [a[f"table:{name}"] == b[f"table:{name}"] for a, b in pairs]
        checks.append(
            Check(f"table of {name}: the same in every byte", 0.0, 0.0, 0.0, sum(same) / len(same), all(same))
        )
    return Answer(checks=tuple(checks))


def _sweep(
    title: str, x_title: str, xs: Sequence[float], of: Callable[[float], Experiment]
) -> Callable[[Runs], Answer]:
    def compute(runs: Runs) -> Answer:
        return Answer(
            plots=(
                Plot(title, x_title, TOK, two_rates(runs, xs, of)),
                Plot(f"{title}: perplexity", x_title, "perplexity", (line(runs, "HELIOS", xs, of, PERPLEXITY),)),
            ),
            beside=tuple(v for x in xs for v in speed(runs, f"{x:g}", of(x))),
        )

    return compute


def of_breaches(x: float) -> Experiment:
    return helios(max_breaches=int(x))


def of_window(x: float) -> Experiment:
    return helios(window_tokens=int(x), max_breaches=int(x) // 2)


def of_coverage(x: float) -> Experiment:
    return helios(coverage=x)


def of_candidates(x: float) -> Experiment:
    return helios(candidates=tuple(CANDIDATES[int(x)][1]))


def candidates(runs: Runs) -> Answer:
    named = [(name, of_candidates(number)) for number, (name, _) in enumerate(CANDIDATES)]
    return Answer(beside=tuple(v for name, x in named for v in speed(runs, name, x)))


def _row(
    name: str, claim: str, compute: Callable[[Runs], Answer], needs: Sequence[Experiment], *, is_ours: bool = False,
    remark: str = "", why: str = "",
) -> Row:  # fmt: skip
    return Row(
        name,
        claim,
        "shape",
        "",
        compute,
        inputs=SIMULATED,
        assumptions=ASSUMED,
        needs=tuple(dict.fromkeys(needs)),
        remark=remark,
        why=why,
        is_ours=is_ours,
    )


_RI = "frequent evaluations on full models cost more than fresh profiles save: tasks change only three times"
_RI_REMARK = (
    "The paper's order does not come out. At RI 50 a fifth of the requests are probes on full models, and exits "
    "of a task are drawn from one distribution, so a fresh profile tells little that the last one did not. The paper's "
    "workload must drift within a task for its order to hold; its own text contradicts itself here."
)
_LD_SW = "defaults: reactions are too few to tell which of them is allowed"
_IDENTITY = (
    "HELIOS with candidates [opt-1.3b], use_greedy_depth: false and use_evaluation: false against early-exit with "
    "model opt-1.3b, otherwise one scenario: tables of requests, tokens and steps, less the word that gives the "
    "reason of a load. Set-ups differ in nothing that matters here but the exits drawn."
)

ROWS = (
    _row(
        "th-sweep",
        "TH: baselines fall as it rises, HELIOS nearly flat",
        thresholds,
        [of_threshold(n)(x) for n in ("OPT-1.3B", "OPT-6.7B", "HELIOS") for x in THRESHOLDS],
        why="HELIOS not flat: as TH rises breaches pass CBCmax and coverage falls below q",
        remark=(
            "HELIOS is not flat here. A partial model's speed does not depend on TH, but which placement serves does. "
            "Breaches of a window rise with TH and reactions with them (both beside), so full models serve more. And "
            "coverage by layer 6 falls below q: evaluations then choose a deeper exit, under the defaults mostly the "
            "full model. It would be flat only where both stay away from their limits over the whole sweep."
        ),
    ),
    _row(
        "ri-sweep",
        "RI 50 to 250: best at 50, falling",
        intervals,
        [of_interval(x) for x in INTERVALS],
        why=_RI,
        remark=_RI_REMARK,
    ),
    _row(
        "ld-sw",
        "LD and SW: switch only fastest and worst perplexity, load only the reverse, both in between",
        reactions,
        (SWITCH_ONLY, HELIOS, LOAD_ONLY),
        why=_LD_SW,
        remark=(
            "Under the defaults q 0.70 puts a task in doubt on the full model at once, where no breach is counted; so "
            "there is little to react to. Under the calibrated set-up reactions are frequent and the order is clear."
        ),
    ),
    _row(
        "ablations",
        "each mechanism off",
        ablations,
        (
            HELIOS,
            *(helios(DEFAULTS, **{name: False}) for name in SWITCHES),
            helios(use_load=False, use_switch=False),
            LOAD_ONLY,
        ),
        is_ours=True,
    ),
    _row(
        "identity",
        "HELIOS with one candidate at full depth is early exit alone",
        identity,
        (SAME, ALONE_SMALL),
        is_ours=True,
        remark=_IDENTITY,
    ),
    _row(
        "cbc-sweep",
        "CBCmax 30 to 70",
        _sweep("Breaches allowed (CBCmax)", "breaches in 100 tokens", BREACHES, of_breaches),
        [of_breaches(x) for x in BREACHES],
        is_ours=True,
    ),
    _row(
        "window-sweep",
        "window 50 to 400 tokens, CBCmax half of it",
        _sweep("Window", "tokens", WINDOWS, of_window),
        [of_window(x) for x in WINDOWS],
        is_ours=True,
    ),
    _row(
        "q-sweep",
        "q 0.5 to 0.9",
        _sweep("Coverage q", "q", COVERAGES, of_coverage),
        [of_coverage(x) for x in COVERAGES],
        is_ours=True,
    ),
    _row(
        "candidates-sweep",
        "candidates: one model or both",
        candidates,
        [of_candidates(k) for k in range(len(CANDIDATES))],
        is_ours=True,
    ),
)
