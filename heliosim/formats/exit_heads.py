"""Where a checkpoint lets tokens leave, and what the trained heads of those exits hold.

``exits.json`` names the exit layers, whether they are ``fixed`` (each with a trained head) or ``anywhere`` (the model's
own norm and head serve every exit), and the file with the heads. A head holds one of these or both, by exit layer N:

- ``exits.N.fc1``, ``exits.N.fc2`` (weight, bias): a residual MLP, ``h + fc2(gelu(fc1(h)))``;
- ``exits.N.norm`` (weight; bias too for OPT): a norm in place of the model's last one.

Behind it comes the model's own output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from heliosim.errors import InputError
from heliosim.formats.weight_files import Part, Stored, read_object, require_part

ExitsKind = Literal["fixed", "anywhere"]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """What a trained head holds: an MLP of inner width ``width`` (0: none), a norm of its own (``has_norm``)."""

    width: int
    has_norm: bool = False

    def parts(self, exit_layer: int, hidden: int, *, has_norm_bias: bool) -> tuple[Part, ...]:
        """Its tensors. ``has_norm_bias``: the architecture's norms have one (OPT)."""
        prefix, made = f"exits.{exit_layer}.", []
        if self.width:
            made += [
                Part("up_weight", (self.width, hidden), (f"{prefix}fc1.weight",)),
                Part("up_bias", (self.width,), (f"{prefix}fc1.bias",)),
                Part("down_weight", (hidden, self.width), (f"{prefix}fc2.weight",)),
                Part("down_bias", (hidden,), (f"{prefix}fc2.bias",)),
            ]
        if self.has_norm:
            made.append(Part("norm_weight", (hidden,), (f"{prefix}norm.weight",)))
            if has_norm_bias:
                made.append(Part("norm_bias", (hidden,), (f"{prefix}norm.bias",)))
        return tuple(made)


def require_head(
    file: Path, exit_layer: int, hidden: int, heads: Mapping[str, Stored], *, has_norm_bias: bool
) -> HeadShape:
    """Check that a trained head is there, whole; returns its shape. Raises InputError."""
    name = f"exits.{exit_layer}.fc1.weight"
    first = heads.get(name)
    is_broken = first is not None and len(first.shape) != 2
    shape = HeadShape(0 if first is None or is_broken else first.shape[0], f"exits.{exit_layer}.norm.weight" in heads)
    if is_broken or not (shape.width or shape.has_norm):
        raise InputError(str(file), name, f"no trained head for exit {exit_layer}", "Train it, or remove the exit.")
    for part in shape.parts(exit_layer, hidden, has_norm_bias=has_norm_bias):
        require_part(file, part, heads)
    return shape


def quarters(layers: int) -> tuple[int, ...]:
    """Exit layers where nobody says which: in steps of a quarter of the layers."""
    step = max(1, layers // 4)
    return ascending("exits", list(range(step, layers + 1, step)), layers)


def read_exits(
    folder: Path, is_opt: bool, layers: int, override: Sequence[int] | None
) -> tuple[ExitsKind, tuple[int, ...], Path | None]:
    """(kind, ascending exit layers ending with the last layer, file with trained heads). Raises InputError."""
    file = folder / "exits.json"
    if not file.is_file():
        if override is not None:
            # no trained heads to be had, so any exit reuses the model's own norm and head
            kind: ExitsKind = "fixed" if set(override) <= {layers} else "anywhere"
            return kind, ascending("exits", list(override), layers), None
        return ("fixed", (layers,), None) if is_opt else ("anywhere", quarters(layers), None)
    values = read_object(file, "")
    if values.get("schema_version") != 1:
        raise InputError(f"{file}: schema_version", values.get("schema_version"), "must be 1", "Rewrite the file.")
    unknown = set(values) - {"schema_version", "kind", "exits", "head_file"}
    if unknown:
        raise InputError(f"{file}: {min(unknown)}", values[min(unknown)], "unknown field", "Remove it.")
    declared = values.get("kind")
    if declared not in ("fixed", "anywhere"):
        raise InputError(f"{file}: kind", declared, "must be 'fixed' or 'anywhere'", "Choose one.")
    exits = ascending(f"{file}: exits", values.get("exits"), layers)
    if override is not None:
        exits = ascending("exits", list(override), layers)
    head = values.get("head_file")
    if head is not None and not isinstance(head, str):
        raise InputError(f"{file}: head_file", head, "must be a file name or null", "Repair the field.")
    if declared == "anywhere" and head is not None:
        raise InputError(f"{file}: head_file", head, "exits anywhere use the model's own head", "Set it to null.")
    if declared == "fixed" and head is None and exits != (layers,):
        remedy = "Name the file with the trained heads, or use kind 'anywhere'."
        raise InputError(f"{file}: head_file", None, "fixed exits need trained heads", remedy)
    if head is None:
        return declared, exits, None
    if not (folder / head).is_file():
        raise InputError(f"{file}: head_file", head, "no such file", "Complete the checkpoint folder.")
    return declared, exits, folder / head


def ascending(where: str, exits: object, layers: int) -> tuple[int, ...]:
    """Check exit layers; the last layer is always one and is added if absent. Raises InputError."""
    remedy = f"Give layer numbers from 1 to {layers}, ascending."
    if not isinstance(exits, list) or not exits:
        raise InputError(where, exits, "must be a list of layers", remedy)
    for exit_layer in exits:
        if not isinstance(exit_layer, int) or isinstance(exit_layer, bool) or not 1 <= exit_layer <= layers:
            raise InputError(where, exit_layer, f"is no layer of a model with {layers}", remedy)
    if any(a >= b for a, b in pairwise(exits)):
        raise InputError(where, exits, "must be ascending", remedy)
    return tuple(exits) if exits[-1] == layers else (*exits, layers)
