"""Puts a measured behaviour table into a measured profile: the two kinds of facts are taken apart, and age apart."""

from __future__ import annotations

import shutil
from pathlib import Path

from heliosim.errors import InputError
from heliosim.formats.files import new_folder, require_free, sha256_of
from heliosim.formats.profile import PROFILE_FOLDER, Profile, load_profile, write_profile
from heliosim.premises import measure_premises
from heliosim.synthetic.table import TABLE, BehaviourFile, load_table


def replace_behaviour(profile: Path, table: Path, out: Path, *, overwrite: bool = False) -> Profile:
    """Write ``profile`` with the behaviour of ``table`` to ``out``. Raises InputError where they are not of the same
    models, exits and weights, or either was not measured.
    """
    require_free(out, PROFILE_FOLDER, overwrite=overwrite, source=profile)
    old, (said, _) = load_profile(profile), load_table(table)
    _require_alike(old, said, table)
    with new_folder(out, PROFILE_FOLDER, overwrite=overwrite) as folder:
        shutil.copyfile(table / TABLE, folder / TABLE)
        for name in old.facts.files:
            if name != TABLE:
                shutil.copyfile(profile / name, folder / name)
        files = {**old.facts.files, TABLE: sha256_of(folder / TABLE)}
        facts = old.facts.model_copy(update={"behaviour": said.facts, "files": files, "premises": []})
        write_profile(folder, facts)
        premises = measure_premises(load_profile(folder).behaviour, said.facts.threshold)
        write_profile(folder, facts.model_copy(update={"premises": [p.row() for p in premises]}))
    return load_profile(out)


def _require_alike(old: Profile, said: BehaviourFile, table: Path) -> None:
    if not old.is_measured:
        remedy = "Compose it again: heliosim profile compose --behaviour FOLDER."
        raise InputError(str(old.folder), old.facts.kind, "only a measured profile keeps its times", remedy)
    if said.origin != "measured":
        remedy = "Measure one: heliosim behaviour measure."
        raise InputError(
            str(table), said.origin, "exits that were not measured have no place beside measured times", remedy
        )
    exits = {name: facts.exits for name, facts in old.facts.models.items()}
    if dict(said.exits) != exits:
        raise InputError(f"{table}: exits", dict(said.exits), f"the profile has {exits}", "Measure the same models.")
    for name, facts in old.facts.models.items():
        if (said.weights or {}).get(name) != facts.weights_sha256:
            problem = "was measured on other weights than the profile's"
            raise InputError(f"{table}: weights", name, problem, "Measure the profile's own checkpoints.")
