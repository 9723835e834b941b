"""Headers of safetensors files, and the tensors an engine makes of what they name. Reads no weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliosim.errors import InputError

Shape = tuple[int, ...]
STORED_DTYPES = frozenset({"F32", "F16", "BF16"})
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Cut:
    """``count`` entries of a tensor along ``axis`` from ``first`` on; zeros where that reaches over its end."""

    axis: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor an engine holds: the concatenation, along the first axis, of tensors of the checkpoint.

    ``whole``, ``cuts``: the part that this one is taken from, cut by cut (one rank of a tensor-parallel group).
    """

    name: str
    shape: Shape
    sources: tuple[str, ...]
    whole: Part | None = None
    cuts: tuple[Cut, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what it looks like there."""

    file: Path
    shape: Shape
    dtype: str


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(file), file.name, "no such file", remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(file), str(error), "is not JSON", "Repair the file.") from None
    if not isinstance(value, dict):
        raise InputError(str(file), value, "must hold a JSON object", "Repair the file.")
    return value


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file: 8 bytes of length, then JSON. Raises InputError."""
    remedy = "Save the file again with safetensors."
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES
            if length >= _MAX_HEADER_BYTES:
                raise InputError(str(file), length, "is not a safetensors file", remedy)
            header = json.loads(stream.read(length))
            size = stream.seek(0, 2) - 8 - length
    except FileNotFoundError:
        raise InputError(str(file), file.name, "no such file", "Complete the checkpoint folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(file), str(error), "has a broken safetensors header", remedy) from None
    tensors: dict[str, Stored] = {}
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = Stored(file, tuple(int(n) for n in entry["shape"]), str(entry["dtype"]))
                if int(entry["data_offsets"][1]) > size:
                    raise InputError(str(file), size, f"is cut short before the end of {name}", "Copy it again.")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(str(file), repr(error), "has a broken safetensors header", remedy) from None
    return tensors


def read_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, from the one weight file or from the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        if not single.is_file():
            remedy = "Save the weights as model.safetensors (other weight formats are not read)."
            raise InputError(str(folder), single.name, "no safetensors weights", remedy)
        return read_header(single)
    weight_map = read_object(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map", weight_map, "must name a file for each tensor", "Repair the file.")
    tensors: dict[str, Stored] = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        tensors |= read_header(folder / shard)
    return tensors


def require_part(folder: Path, part: Part, tensors: Mapping[str, Stored]) -> None:
    """Raise InputError unless the sources of a part exist and stack to its shape."""
    remedy = "Check that weights and config.json belong together."
    rows = 0
    for source in part.sources:
        stored = tensors.get(source)
        if stored is None:
            raise InputError(str(folder), source, "missing tensor", remedy)
        if stored.dtype not in STORED_DTYPES:
            problem = f"{source} has an unsupported dtype"
            raise InputError(str(stored.file), stored.dtype, problem, "Save as float32, float16 or bfloat16.")
        if len(stored.shape) != len(part.shape) or stored.shape[1:] != part.shape[1:]:
            raise InputError(str(stored.file), stored.shape, f"{source} has not the shape config.json says", remedy)
        rows += stored.shape[0]
    if rows != part.shape[0]:
        problem = f"{' + '.join(part.sources)} should have {part.shape[0]} rows"
        raise InputError(str(folder), rows, problem, remedy)
