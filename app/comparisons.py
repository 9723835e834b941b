"""What the page Compare compares: systems of a question, one server each, and a fleet of one of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from heliosim_app.question import Question, systems
from heliosim_app.work import key_of

from heliosim.errors import UnknownNameError
from heliosim.scenario import Scenario

ABLATIONS: dict[str, dict[str, Any]] = {
    "HELIOS without greedy depth": {"use_greedy_depth": False},
    "HELIOS without deeper loads": {"use_load": False},
    "HELIOS without switching": {"use_switch": False},
    "HELIOS without reassessment": {"use_reassess": False},
}
"""HELIOS with one mechanism turned off."""


@dataclass(frozen=True)
class Comparison:
    """``chosen``: systems in order, empty: all but the ablations. ``focus_per_s``: rate per server that is looked at,
    None: one that all should keep up with. ``requests``: of one run.
    """

    question: Question = field(default_factory=Question)
    chosen: tuple[str, ...] = ()
    focus_per_s: float | None = None
    requests: int = 300
    replications: int = 3
    most_replicas: int = 3

    @property
    def known(self) -> dict[str, dict[str, Any]]:
        """Controller sections by system, ablations of HELIOS last."""
        found = systems(self.question.models, self.question.device)
        helios = found.get("HELIOS")
        more = {name: {**helios, **changes} for name, changes in ABLATIONS.items()} if helios else {}
        return {**found, **more}

    @property
    def names(self) -> tuple[str, ...]:
        """The systems compared. Raises UnknownNameError for one these models do not have."""
        known = self.known
        for name in self.chosen:
            if name not in known:
                raise UnknownNameError("systems", name, known)
        wanted = self.chosen or tuple(name for name in known if name not in ABLATIONS)
        return tuple(name for name in known if name in wanted)

    @property
    def baselines(self) -> tuple[str, ...]:
        """What others can be compared with: first the larger model under early exit, if it is chosen."""
        early = [name for name in self.names if name.startswith("early exit")]
        first = early[-1] if early else self.names[-1]
        return (first, *(name for name in self.names if name != first))

    def scenarios(self) -> dict[str, Scenario]:
        """One server of each system; the study sets their rate. Raises InputError for what cannot be so."""
        made = replace(self.question, requests=self.requests).scenario()
        return {
            name: made.model_copy(update={"controller": self.known[name], "name": _file_name(name)})
            for name in self.names
        }

    def key(self, *parts: Any) -> str:
        """A name for what comes of it: everything it depends on, and ``parts``."""
        hashes = [scenario.hash for scenario in self.scenarios().values()]
        own = (self.names, self.focus_per_s, self.replications, self.question.profile().hash)
        return key_of("compare", hashes, *own, *parts)


def _file_name(system: str) -> str:
    return system.replace(" ", "-")


def focus_system(names: Sequence[str], baseline: str) -> str:
    """The system a comparison is about: the first HELIOS, else the first that is not the baseline."""
    others = [name for name in names if name != baseline]
    return next((name for name in others if name.startswith("HELIOS")), others[0] if others else baseline)
