"""Exits on record, of a profile or a behaviour table, to be replayed in a run in place of those of its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heliosim.behaviour import Behaviour
from heliosim.engines.replayed import require_exits
from heliosim.errors import InputError
from heliosim.formats.files import sha256_of
from heliosim.formats.profile import BehaviourFacts, Profile
from heliosim.scenario import Scenario


@dataclass(frozen=True)
class Replay:
    """Recorded exits. ``label``: what they are, said wherever the run's figures show."""

    behaviour: Behaviour
    facts: BehaviourFacts
    label: str


def open_replay(name_or_folder: str) -> Replay:
    """The exits of a profile (folder or shipped name) or of a behaviour table (folder). Raises InputError."""
    from heliosim.profile_view import open_profile
    from heliosim.synthetic.table import FACTS, load_table

    folder = Path(name_or_folder)
    if (folder / FACTS).exists():
        said, behaviour = load_table(folder)
        return Replay(behaviour, said.facts, f"{folder.resolve().name} ({said.origin} exits, {said.sha256[:8]})")
    profile = open_profile(name_or_folder)
    if not profile.has_behaviour:
        remedy = "Give a profile with behaviour, or a table of: heliosim behaviour synthesize."
        raise InputError("--replay-exits", name_or_folder, "the profile knows no exits", remedy)
    digest = sha256_of(profile.folder / "behaviour.parquet")
    kind = "measured" if profile.is_measured else f"{profile.facts.kind} profile's"
    label = f"{profile.folder.resolve().name} ({kind} exits, {digest[:8]})"
    return Replay(profile.behaviour, profile.facts.behaviour, label)


def replaying(profile: Profile, scenario: Scenario, replay: Replay) -> Profile:
    """The profile with the replayed exits as its behaviour, so that a controller knows of them what it would know of
    its own. Raises InputError unless they are of the scenario's models, with the same exits.
    """
    require_exits(replay.behaviour, {name: profile.spec(name) for name in scenario.models})
    return profile.with_behaviour(replay.behaviour, replay.facts)
