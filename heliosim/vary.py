"""Variations of a scenario: dotted paths to its fields, values from text, and a check of every point beforehand.

A scenario is taken as plain data (what its file says, paths resolved), changed, and validated again, so that a varied
scenario is refused for the same reasons and with the same words as one written by hand.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import validate
from heliosim.formats.profile import Profile
from heliosim.scenario import Scenario, parse_controller

Plain = dict[str, Any]
Changes = Mapping[str, Any]

_PATHS = re.compile(r"(?:.*\.)?(?:profile|trace)")


def plain_scenario(scenario: Scenario) -> Plain:
    """What a scenario says, without the defaults it left out."""
    return scenario.model_dump(mode="json", exclude_unset=True)


def changed(plain: Plain, changes: Changes) -> Plain:
    """A copy with fields set by dotted path (``workload.tasks.0.share``). A mapping replaces the mapping there; short
    paths are set first, so ``controller`` and ``controller.threshold`` may be given together.

    Raises InputError for a path through something that has no such place.
    """
    value = copy.deepcopy(plain)
    for path in sorted(changes, key=lambda p: p.count(".")):
        _set(value, path, copy.deepcopy(changes[path]))
    return value


def changed_at(plain: Plain, changes: Changes, where: str) -> Plain:
    """``changed``, with errors that begin with ``where``."""
    try:
        return changed(plain, changes)
    except InputError as error:
        error.where = f"{where}: {error.where}"
        raise


def _set(plain: Plain, path: str, new: Any) -> None:
    parts = path.split(".")
    holder: Any = plain
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        if isinstance(holder, dict):
            if is_last:
                holder[part] = new
            elif holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
        elif isinstance(holder, list) and part.isdigit() and int(part) < len(holder):
            if is_last:
                holder[int(part)] = new
            holder = holder[int(part)]
        else:
            what = f"a list of {len(holder)}" if isinstance(holder, list) else f"{holder!r}"
            problem = f"{'.'.join(parts[:depth]) or 'the scenario'} is {what}, it has no {part!r}"
            raise InputError(f"field {path}", new, problem, "Places in a list count from 0.")


def checked(plain: Plain, where: str) -> Scenario:
    """The scenario of plain data. Raises InputError that begins with ``where`` and names the field."""
    try:
        scenario = validate(Scenario, plain, where)
        parse_controller(scenario.controller, where)
    except InputError as error:
        if not error.where.startswith(where):
            error.where = f"{where}: {error.where}"
        raise
    return scenario


def check_against(scenario: Scenario, profile_of: Callable[[str], Profile], where: str) -> None:
    """Refuse what the profile cannot run: models, tasks, exits, memory; of a fleet for every group. Builds servers,
    simulates nothing.
    """
    from heliosim.assembly import build_server
    from heliosim.recorder import NullRecorder

    try:
        for one in of_groups(scenario):
            profile = profile_of(one.profile)
            build_server(one, profile, NullRecorder())
            known = profile.facts.behaviour.tasks
            for number, task in enumerate(one.workload.tasks):
                if task.task not in known:
                    raise UnknownNameError(f"workload.tasks.{number}.task", task.task, known)
        trace = scenario.workload.trace
        if trace is not None and not Path(trace).is_file():
            raise InputError("workload.trace", trace, "no such file", "Check the path.")
    except InputError as error:
        error.where = f"{where}: {error.where}"
        raise


def of_groups(scenario: Scenario) -> list[Scenario]:
    """The scenario as each group of its fleet has it; without a fleet itself alone."""
    if scenario.fleet is None:
        return [scenario]
    return [scenario.of_group(group) for group in scenario.fleet.replicas]


def resolved(path: str, value: Any, folder: Path) -> Any:
    """A value of a field that names a file, taken from ``folder``; other fields' values as they are."""
    if not _PATHS.fullmatch(path) or not isinstance(value, str) or Path(value).is_absolute():
        return value
    beside = (folder / value).resolve()
    return str(beside) if beside.exists() or path.endswith("trace") or "/" in value else value


def parse_set(text: str) -> tuple[str, list[Any]]:
    """``field=v1,v2`` as a path and its values, each read as YAML; commas inside brackets and quotes do not part.

    Raises InputError.
    """
    path, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.[\w-]+)*", path.strip()) or not values.strip():
        remedy = "For instance --set controller.threshold=0.7,0.8."
        raise InputError("--set", text, "not of the form field=value,value", remedy)
    return path.strip(), [_scalar(part, text) for part in _parts(values)]


def _parts(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _scalar(text: str, whole: str) -> Any:
    if re.fullmatch(r"\s*[-+]?\d+(\.\d*)?[eE][-+]?\d+\s*", text):  # YAML 1.1 takes 1e3 for text
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError("--set", whole, f"{text!r} cannot be read as a value", "Quote it.") from None


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest endings of dotted paths that tell them apart and do not begin with a place in a list."""
    names = {}
    for path in paths:
        parts = path.split(".")
        names[path] = next(
            ending
            for ending in (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
            if ending == path
            or (not ending[0].isdigit() and sum(p == ending or p.endswith(f".{ending}") for p in paths) == 1)
        )
    return names


def value_text(value: Any) -> str:
    """A value for a label: a mapping by its kind or name, if it has one."""
    if isinstance(value, dict):
        known = value.get("kind", value.get("name"))
        if isinstance(known, str):
            more = {k: v for k, v in value.items() if k not in ("kind", "name")}
            return known + (f"({', '.join(f'{k}={value_text(v)}' for k, v in more.items())})" if more else "")
    if isinstance(value, str):
        return Path(value).name if "/" in value else value
    return json.dumps(value)


def label(changes: Changes) -> str:
    """A point for people: ``threshold=0.8, rate_per_s=4``."""
    names = short_names(list(changes))
    return ", ".join(f"{names[path]}={value_text(value)}" for path, value in changes.items())
