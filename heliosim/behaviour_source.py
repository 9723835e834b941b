"""Opens a behaviour table by name, for whoever shows one: of a profile (folder or shipped name) or a behaviour
folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heliosim.behaviour_tokens import Tokens
from heliosim.formats.profile import CAUTIONS, BehaviourFacts, Profile
from heliosim.formats.tokens import read_tokens

ORIGINS = {
    "measured": "measured",
    "synthetic": "synthetic: drawn from published and assumed figures, not measured",
    "imported": "imported exits, measured by others",
}


@dataclass(frozen=True)
class Opened:
    """A table, what it is called, where its exits come from (in words), what else must be said, and its facts."""

    name: str
    origin: str
    notes: tuple[str, ...]
    tokens: Tokens
    facts: BehaviourFacts


def open_behaviour(named: str) -> Opened:
    """Raises InputError or UnknownNameError where there is no such table."""
    from heliosim.profile_view import open_profile
    from heliosim.synthetic.table import FACTS, TABLE, load_table

    folder = Path(named)
    if (folder / FACTS).is_file():
        said, _ = load_table(folder)
        tokens = read_tokens(folder / TABLE, said.exits)
        return Opened(folder.name, ORIGINS[said.origin], said.about, tokens, said.facts)
    return behaviour_of_profile(open_profile(named))


def behaviour_of_profile(profile: Profile, name: str = "") -> Opened:
    """The table of a profile. Raises InputError if it has none."""
    profile.require_behaviour()
    exits = {model: facts.exits for model, facts in profile.facts.models.items()}
    tokens = read_tokens(profile.folder / "behaviour.parquet", exits)
    notes: tuple[str, ...] = ()
    if not profile.is_measured:
        made = profile.facts.derivation
        notes = (CAUTIONS[profile.facts.kind], *(made.synthetic if made is not None else ()))
    return Opened(name or profile.folder.name, profile.origin, notes, tokens, profile.facts.behaviour)
