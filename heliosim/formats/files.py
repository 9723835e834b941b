"""Small helpers every format shares: atomic writes, hashes, strict parsing with one-line errors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from heliosim.errors import InputError

M = TypeVar("M", bound=BaseModel)
LOCK = ".lock"


class Strict(BaseModel):
    """Base of every schema: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """A folder that a command writes whole: ``what`` it is, the file that is its ``mark``, and every file's name."""

    what: str
    mark: str
    names: frozenset[str]


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
    held = sorted(path.iterdir())
    odd = next((p.name for p in held if p.name not in kind.names or not p.is_file()), None)
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
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), path.name, "no such file", "Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}", path.name, "not valid YAML", "Correct the syntax.") from None
    if not isinstance(raw, dict):
        raise InputError(str(path), type(raw).__name__, f"{what} is a mapping of fields", f"See {page}.")
    return raw


def validate(model: type[M], value: Any, where: str) -> M:
    """Build ``model`` from plain data. The first problem becomes one InputError naming field, value and remedy."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise input_error(error, where, model) from None


def input_error(error: ValidationError, where: str, model: type[BaseModel]) -> InputError:
    """One line from pydantic's first complaint, with the nearest known field for a misspelt one."""
    import difflib

    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].removeprefix("Value error, ")
    remedy = "Correct the value."
    place = f"{where}, field {path}" if path else where
    if first["type"] == "extra_forbidden":
        known = sorted(_field_names(model))
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        problem = "unknown field"
        remedy = f"Did you mean {near[0]!r}?" if near else "Remove it."
    elif first["type"] == "missing":
        problem, remedy = "missing field", "Add it."
        return InputError(place, None, problem, remedy)
    return InputError(place, first.get("input"), problem, remedy)


def _field_names(model: type[BaseModel]) -> set[str]:
    """Field names of a schema and of every schema inside it."""
    names: set[str] = set()
    pending: list[Any] = [model]
    seen: set[Any] = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            names |= set(current.model_fields)
            pending += [field.annotation for field in current.model_fields.values()]
        else:
            pending += list(getattr(current, "__args__", ()))
    return names
