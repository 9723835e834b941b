"""Writes tuned heads: beside the checkpoint, or into a new folder of links to its files. Weights are never touched.

The head file comes first, under a name of its content; then ``exits.json`` names it, in one step; then the head file
that was named before goes. So a reader meets the old exits or the new ones, whole, whenever the writing stops.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from heliosim.errors import InputError
from heliosim.formats.files import FolderKind, new_folder, read_json, require_free, write_json
from heliosim.formats.whole import whole_file

RECORD = "exit_tuning.json"
EXITS = "exits.json"


def require_writable(checkpoint: Path, out: Path | None, *, overwrite: bool, is_shipped: bool) -> None:
    """Refuse what cannot be written, before anything is trained. Raises InputError."""
    if out is not None:
        if out.resolve() == checkpoint.resolve():
            raise InputError("--out", str(out), "is the checkpoint itself", "Leave --out out to write beside it.")
        require_free(out, _kind(checkpoint, out), overwrite=overwrite, source=checkpoint)
        return
    if is_shipped:
        raise InputError("--out", None, "a shipped checkpoint is not written to", "Name a folder for the tuned one.")
    if not os.access(checkpoint, os.W_OK):
        raise InputError(str(checkpoint), checkpoint.name, "the folder cannot be written", "Name another with --out.")
    if (checkpoint / EXITS).exists() and not overwrite:
        remedy = "Pass --overwrite to replace them, or name another folder with --out."
        raise InputError(str(checkpoint / EXITS), EXITS, "the checkpoint says already where it exits", remedy)


def write_heads(
    checkpoint: Path,
    out: Path | None,
    tensors: Mapping[str, Tensor],
    exits: list[int],
    record: Mapping[str, Any],
    *,
    overwrite: bool,
    is_copied: bool,
) -> Path:
    """Write heads, ``exits.json`` and the record of the tuning; returns the folder that holds them."""
    if out is None:
        _put(checkpoint, tensors, exits, record)
        return checkpoint
    with new_folder(out, _kind(checkpoint, out), overwrite=overwrite) as folder:
        for file in _files(checkpoint):
            if is_copied:
                shutil.copyfile(file, folder / file.name)
            else:
                os.symlink(file.resolve(), folder / file.name)
        _put(folder, tensors, exits, record)
    return out


def _put(folder: Path, tensors: Mapping[str, Tensor], exits: list[int], record: Mapping[str, Any]) -> None:
    data = save(dict(sorted(tensors.items())), {"format": "pt"})
    name = f"exit_heads.{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
    file = folder / EXITS
    before = read_json(file).get("head_file") if file.is_file() else None
    with whole_file(folder / name) as temporary:
        temporary.write_bytes(data)
    write_json(folder / RECORD, dict(record))
    write_json(file, {"schema_version": 1, "kind": "fixed", "exits": exits, "head_file": name})
    if isinstance(before, str) and before != name and _is_heads(before):
        (folder / before).unlink(missing_ok=True)


def _is_heads(name: str) -> bool:
    return name.startswith("exit_heads") and name.endswith(".safetensors")


def _files(checkpoint: Path) -> list[Path]:
    """What a tuned folder shares with its checkpoint: every file but exits and heads."""
    found = [p for p in sorted(checkpoint.iterdir()) if p.is_file() and not p.name.startswith(".")]
    return [p for p in found if p.name not in (EXITS, RECORD) and not _is_heads(p.name)]


def _kind(checkpoint: Path, out: Path) -> FolderKind:
    """A tuned checkpoint of this one: links or copies of its files, heads, and the record that marks it."""
    names = {p.name for p in _files(checkpoint)} | {EXITS, RECORD}
    if out.is_dir():
        names |= {p.name for p in out.iterdir() if _is_heads(p.name)}
    return FolderKind("a tuned checkpoint", RECORD, frozenset(names))
