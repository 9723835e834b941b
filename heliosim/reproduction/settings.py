"""Set-ups that experiments name: how a setting, a system and changes become a scenario with its profile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from heliosim.errors import UnknownNameError
from heliosim.formats.profile import Profile
from heliosim.metrics import Slo
from heliosim.reproduction import opt_pair, serving
from heliosim.reproduction.measure import measure
from heliosim.reproduction.rows import Experiment
from heliosim.reproduction.setups import SETUPS
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario

VERSION = 2
"""Of what is measured: a higher one makes cached results be run again."""
OPT, LOAD, LARGE = "OPT pair, batch 1", "OPT pair under load, composed", "large pair, composed"


@dataclass(frozen=True)
class Prepared:
    """One run, ready; ``slo`` for attainment. ``profile`` is made when the run needs it."""

    scenario: Scenario
    profile: Callable[[], Profile]
    slo: Slo | None = None


def _opt(experiment: Experiment, seed: int, share: float) -> Prepared:
    if experiment.setup not in SETUPS:
        raise UnknownNameError("set-up", experiment.setup, SETUPS)
    setup = SETUPS[experiment.setup]
    system = opt_pair.controller(_system(opt_pair.SYSTEMS, experiment), setup)
    made = opt_pair.scenario({**system, **dict(experiment.changes)}, seed, share)
    return Prepared(made, lambda: opt_pair.profile(seed, setup.request_effect))


def _load(experiment: Experiment, seed: int, share: float) -> Prepared:
    changes = dict(experiment.changes)
    rate = float(str(changes.pop("rate_per_s")))
    system = {**_system(serving.made("opt"), experiment), **changes}
    return Prepared(serving.under_load(system, rate, seed, share), lambda: serving.profile("opt"), serving.SLO)


def _large(experiment: Experiment, seed: int, share: float) -> Prepared:
    changes = dict(experiment.changes)
    users = int(str(changes.pop("users")))
    system = {**_system(serving.made("large"), experiment), **changes}
    return Prepared(serving.with_users(system, users, seed, share), lambda: serving.profile("large"))


SETTINGS: Mapping[str, Callable[[Experiment, int, float], Prepared]] = {OPT: _opt, LOAD: _load, LARGE: _large}


def _system(systems: Mapping[str, Mapping[str, Any]], experiment: Experiment) -> Mapping[str, Any]:
    if experiment.system not in systems:
        raise UnknownNameError(f"system of {experiment.setting}", experiment.system, systems)
    return systems[experiment.system]


def prepare(experiment: Experiment, seed: int, share: float = 1.0) -> Prepared:
    if experiment.setting not in SETTINGS:
        raise UnknownNameError("setting", experiment.setting, SETTINGS)
    return SETTINGS[experiment.setting](experiment, seed, share)


def perform(task: tuple[Experiment, int, float]) -> dict[str, float]:
    """Run one replication of an experiment and measure it. Top level, so that it can be sent to a worker."""
    experiment, seed, share = task
    made = prepare(experiment, seed, share)
    return measure(run_simulated(made.scenario, made.profile()), made.slo)


@cache
def _setting_digest(setting: str, request_effect: float | None) -> str:
    """Of everything a setting rests on besides scenario and seed."""
    if request_effect is not None:
        return opt_pair.profile(0, request_effect).hash
    return serving.profile("opt" if setting == LOAD else "large").hash


def key_of(experiment: Experiment, seed: int, share: float) -> str:
    """Name of a cached result: the same inputs, the same key."""
    effect = SETUPS[experiment.setup].request_effect if experiment.setting == OPT else None
    parts = [VERSION, prepare(experiment, seed, share).scenario.hash, _setting_digest(experiment.setting, effect)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
