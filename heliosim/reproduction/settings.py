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
from heliosim.reproduction.inputs import EXITS
from heliosim.reproduction.measure import measure
from heliosim.reproduction.rows import Experiment
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario

VERSION = 1
"""Of what is measured: a higher one makes cached results be run again."""


@dataclass(frozen=True)
class Prepared:
    """One run, ready: ``watts`` by model for energy, where known; ``slo`` for attainment."""

    scenario: Scenario
    profile: Profile
    watts: Mapping[str, float] | None = None
    slo: Slo | None = None


def _opt(experiment: Experiment, seed: int, share: float) -> Prepared:
    controller = {**_system(opt_pair.SYSTEMS, experiment), **dict(experiment.changes)}
    watts = {model: opt_pair.watts(model) for model in EXITS}
    return Prepared(opt_pair.scenario(controller, seed, share), opt_pair.profile(seed), watts)


def _serving(experiment: Experiment, seed: int, share: float) -> Prepared:
    changes = dict(experiment.changes)
    rate = float(str(changes.pop("rate_per_s")))
    controller = {**_system(serving.SYSTEMS, experiment), **changes}
    return Prepared(serving.scenario(controller, rate, seed, share), serving.profile(), slo=serving.SLO)


SETTINGS: Mapping[str, Callable[[Experiment, int, float], Prepared]] = {
    "OPT pair, batch 1": _opt,
    "Llama-2 pair, A100": _serving,
}


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
    return measure(run_simulated(made.scenario, made.profile), made.watts, made.slo)


@cache
def _setting_digest(setting: str) -> str:
    """Of everything a setting rests on besides scenario and seed."""
    if setting == "OPT pair, batch 1":
        return opt_pair.profile(0).hash
    return serving.profile().hash


def key_of(experiment: Experiment, seed: int, share: float) -> str:
    """Name of a cached result: the same inputs, the same key."""
    scenario = prepare_scenario(experiment, seed, share)
    parts = [VERSION, scenario.hash, _setting_digest(experiment.setting)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def prepare_scenario(experiment: Experiment, seed: int, share: float) -> Scenario:
    """The scenario alone, without drawing exits."""
    if experiment.setting == "OPT pair, batch 1":
        return opt_pair.scenario({**_system(opt_pair.SYSTEMS, experiment), **dict(experiment.changes)}, seed, share)
    return prepare(experiment, seed, share).scenario
