"""Small helpers every format shares: atomic writes, hashes, strict parsing with one-line errors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from heliosim.errors import InputError, UnknownNameError

M = TypeVar("M", bound=BaseModel)
LOCK = ".lock"
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class Strict(BaseModel):
    """Base of every schema: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def without_none(content: dict[str, Any], *names: str) -> dict[str, Any]:
    """A schema's plain data without these fields where they are None: what came later leaves older files and hashes as
    they were.
    """
    return {name: value for name, value in content.items() if value is not None or name not in names}


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that a reader never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON for people and diffs: sorted keys, two spaces, a newline at the end."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@dataclass(frozen=True)
class FolderKind:
    """A folder that a command writes whole: ``what`` it is, the file that is its ``mark``, every file's name, and the
    ``folders`` in it with the names of their files.
    """

    what: str
    mark: str
    names: frozenset[str]
    folders: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def is_own(self, path: Path) -> bool:
        """Whether something in such a folder is what the command writes."""
        if path.name in self.folders and path.is_dir() and not path.is_symlink():
            return all(p.is_file() and p.name in self.folders[path.name] for p in path.iterdir())
        return path.name in self.names and path.is_file()


def require_free(path: Path, kind: FolderKind, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse a folder that exists, with ``overwrite`` one that holds anything but what makes it of this kind, or the
    ``source`` that is being read. Raises InputError.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if not overwrite:
        raise InputError(str(path), path.name, "already exists", "Choose another folder or pass --overwrite.")
    remedy = "It is not replaced: choose another folder, or remove it yourself."
    if not path.is_dir():
        raise InputError(str(path), path.name, "is no folder", remedy)
    if source is not None and source.resolve().is_relative_to(path.resolve()):
        raise InputError(str(path), str(source), "holds the file that is being read", remedy)
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(str(path), path.name, "is or holds the folder you are in", remedy)
    held = sorted(path.iterdir())
    odd = next((p.name for p in held if not kind.is_own(p)), None)
    if odd is not None:
        raise InputError(str(path), odd, f"holds what is no part of {kind.what}", remedy)
    if held and not (path / kind.mark).is_file():
        raise InputError(str(path), path.name, f"is not {kind.what} ({kind.mark} is missing)", remedy)


@contextmanager
def new_folder(path: Path, kind: FolderKind, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes ``path`` if the block succeeds, and vanishes if not.

    Raises InputError if ``path`` exists, unless ``overwrite`` and it is a folder of this kind.
    """
    require_free(path, kind, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        require_free(path, kind, overwrite=overwrite)  # again: much time may have passed
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / "old")
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old / "old", path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_own(path: Path, marks: Sequence[str], what: str) -> None:
    """Refuse a folder to go on in that holds something and none of the ``marks`` of ``what``. Raises InputError."""
    if path.exists() and not path.is_dir():
        raise InputError(str(path), path.name, "is no folder", "Choose another with --out.")
    if (
        path.is_dir()
        and any(p.name != LOCK for p in path.iterdir())
        and not any((path / mark).exists() for mark in marks)
    ):
        raise InputError(str(path), path.name, f"the folder exists and holds no {what}", "Choose another with --out.")


def require_new_file(path: Path | None, *, overwrite: bool) -> None:
    """Refuse a file to write that is there, unless ``overwrite``, and one that cannot be. Raises InputError."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(str(path), path.name, "is a folder", "Name a file.")
    if path.exists() and not overwrite:
        raise InputError(str(path), path.name, "already exists", "Choose another file or pass --overwrite.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(str(path), above.name, "lies in what is no folder", "Choose another file.")


@contextmanager
def sole_writer(out: Path, what: str) -> Iterator[None]:
    """Hold the folder's lock. A folder left with nothing else vanishes. Raises InputError if another holds the lock."""
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"another {what} is writing here"
            raise InputError(str(out), out.name, problem, "Wait for it, or stop it.") from None
        try:
            yield
        finally:
            if [p.name for p in out.iterdir()] == [LOCK]:
                path.unlink()
                out.rmdir()


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises InputError naming file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), path.name, "no such file", "Check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(
            f"{path}, line {line}", path.name, f"not valid JSON: {error}", "Restore or remake the file."
        ) from None


def read_yaml(path: Path, what: str = "the file", page: str = "docs/formats.md") -> dict[str, Any]:
    """A YAML mapping. Raises InputError naming file and line; ``what`` it is and the ``page`` that tells its fields."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), path)
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(str(path), path.name, "no such file", "Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}", path.name, "not valid YAML", "Correct the syntax.") from None
    if not isinstance(raw, dict):
        raise InputError(str(path), type(raw).__name__, f"{what} is a mapping of fields", f"See {page}.")
    return raw


def _refuse_twice(node: Any, path: Path) -> None:
    """Refuse a key given twice in a mapping, of which YAML would drop the first. Raises InputError naming the line."""
    import yaml

    seen: set[tuple[str, str]] = set()
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        if not isinstance(part, tuple):
            _refuse_twice(part, path)
            continue
        key, value = part
        said = (key.tag, str(key.value))
        if said in seen:
            where = f"{path}, line {key.start_mark.line + 1}"
            raise InputError(where, key.value, "the field is given twice", "Keep one of them.")
        seen.add(said)
        _refuse_twice(value, path)


def validate(model: type[M], value: Any, where: str) -> M:
    """Build ``model`` from plain data. The first problem becomes one InputError naming field, value and remedy."""
    refuse_true(model, value, where)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise input_error(error, where, model) from None


def input_error(error: ValidationError, where: str, model: type[BaseModel]) -> InputError:
    """One line from pydantic's complaints: a misspelt field first, with the nearest known one of its level, since what
    is said to be missing may be the one that is misspelt; else the first.
    """
    import difflib

    complaints = error.errors()
    chosen = complaints[0]
    if chosen["type"] == "missing":
        beside = [c for c in complaints if c["type"] in UNKNOWN and c["loc"][:-1] == chosen["loc"][:-1]]
        chosen = next(iter(beside), chosen)
    path = ".".join(str(part) for part in chosen["loc"])
    problem = chosen["msg"].removeprefix("Value error, ")
    remedy = "Correct the value."
    place = f"{where}, field {path}" if path else where
    if chosen["type"] == "union_tag_invalid":
        tags, field = chosen["ctx"]["expected_tags"], chosen["ctx"]["discriminator"].strip("'")
        return UnknownNameError(f"{place}.{field}", chosen["ctx"]["tag"], re.findall(r"'([^']*)'", tags))
    if chosen["type"] in ("tuple_type", "list_type"):
        problem, remedy = "a list is wanted", "Put it into brackets: [a, b]."
    if chosen["type"] in UNKNOWN:
        known = sorted(_field_names(model, chosen["loc"][:-1]))
        name = str(chosen["loc"][-1])
        near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.startswith(f"{name}_")]
        problem = "unknown field"
        remedy = f"Did you mean {near[0]!r}?" if near else f"Remove it. Known: {', '.join(known)}."
    elif chosen["type"] == "missing":
        return InputError(place, None, "missing field", "Add the field.")
    return InputError(place, chosen.get("input"), problem, remedy)


def _field_names(model: Any, path: Sequence[int | str]) -> set[str]:
    """Names a file may use at a place of a schema: fields (by alias) of every schema that may stand there."""
    places: list[Any] = _schemas(model)
    for part in path:
        inner: list[Any] = []
        for place in places:
            if isinstance(part, str):
                inner += [f.annotation for name, f in place.items() if part in (name, f.alias)]
        places = [found for annotation in inner for found in _schemas(annotation)] if inner else places
    return {field.alias or name for place in places for name, field in place.items()}


def _schemas(annotation: Any) -> list[Any]:
    """Fields by name of the schemas in an annotation: itself, or those within optional, lists, mappings."""
    fields = getattr(annotation, "model_fields", None) or getattr(annotation, "__pydantic_fields__", None)
    if isinstance(annotation, type) and fields:
        return [fields]
    if isinstance(annotation, type) and is_dataclass(annotation):
        hints = get_type_hints(annotation)
        return [{field.name: FieldInfo(annotation=hints[field.name]) for field in dataclass_fields(annotation)}]
    return [found for inside in getattr(annotation, "__args__", ()) for found in _schemas(inside)]


def refuse_true(annotation: Any, value: Any, where: str, path: tuple[str, ...] = ()) -> None:
    """Refuse true and false where a number is wanted, which pydantic takes for 1 and 0. Raises InputError."""
    if isinstance(value, bool):
        kinds = _kinds(annotation)
        if kinds & {int, float} and bool not in kinds:
            raise InputError(f"{where}, field {'.'.join(path)}", value, "a number is wanted", "Correct the value.")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            refuse_true(annotation, one, where, (*path, str(number)))
    elif isinstance(value, dict):
        places = _schemas(annotation)
        for key, one in value.items():
            inner = [place[key].annotation for place in places if key in place] if places else [annotation]
            for found in inner:
                refuse_true(found, one, where, (*path, str(key)))


def _kinds(annotation: Any) -> set[Any]:
    """Plain types in an annotation, those within optional, lists and mappings too."""
    inside = getattr(annotation, "__args__", ())
    return {kind for one in inside for kind in _kinds(one)} if inside else {annotation}
