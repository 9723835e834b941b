"""A behaviour table outside a profile: ``behaviour.parquet`` in the profile's schema, and JSON to say what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from heliosim.behaviour import ANY_SOURCE, Behaviour
from heliosim.errors import InputError
from heliosim.formats.files import (
    FolderKind,
    Strict,
    new_folder,
    read_json,
    sha256_of,
    validate,
    without_none,
    write_json,
)
from heliosim.formats.profile import BehaviourFacts, load_behaviour
from heliosim.synthetic.spec import ExitSpec

if TYPE_CHECKING:
    import pyarrow as pa

Origin = Literal["synthetic", "imported", "measured"]
TABLE, FACTS = "behaviour.parquet", "behaviour.json"
BEHAVIOUR_FOLDER = FolderKind("a behaviour table", FACTS, frozenset({TABLE, FACTS}))


class BehaviourFile(Strict):
    """Schema of behaviour.json."""

    schema_version: Literal[1] = 1
    origin: Origin
    about: tuple[str, ...] = Field(description="what must be said wherever the table is used")
    exits: dict[str, tuple[int, ...]]
    facts: BehaviourFacts
    seed: int | None
    spec: ExitSpec | None
    sha256: str
    weights: dict[str, str] | None = Field(default=None, description="of measured tables: digest by model")

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(handler(self), "weights")


@dataclass(frozen=True)
class BehaviourTable:
    """Rows of texts with their facts. ``origin``: drawn from a ``spec`` with a ``seed``, or exits others measured."""

    table: pa.Table
    facts: BehaviourFacts
    exits: Mapping[str, tuple[int, ...]]
    origin: Origin
    about: tuple[str, ...]
    spec: ExitSpec | None = None
    seed: int | None = None

    def write(self, path: Path) -> None:
        """The table as Parquet, the same bytes every time."""
        import pyarrow.parquet as pq

        pq.write_table(self.table, path, compression="zstd", compression_level=15)

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write table and facts into a new folder."""
        with new_folder(folder, BEHAVIOUR_FOLDER, overwrite=overwrite) as made:
            self.write(made / TABLE)
            said = BehaviourFile(
                origin=self.origin,
                about=self.about,
                exits=dict(self.exits),
                facts=self.facts,
                seed=self.seed,
                spec=self.spec,
                sha256=sha256_of(made / TABLE),
            )
            write_json(made / FACTS, said.model_dump(mode="json"))


def load_table(folder: Path) -> tuple[BehaviourFile, Behaviour]:
    """A saved table: what it is, and its texts. Raises InputError if it is none or was changed."""
    path = folder / FACTS
    if not path.exists():
        remedy = "Make one with: heliosim behaviour synthesize SPEC -o FOLDER, or heliosim behaviour measure."
        raise InputError(str(folder), folder.name, "no behaviour table here", remedy)
    said = validate(BehaviourFile, read_json(path), str(path))
    if not (folder / TABLE).exists() or sha256_of(folder / TABLE) != said.sha256:
        raise InputError(f"{path}, field sha256", said.sha256, "the table is missing or was changed", "Make it again.")
    return said, load_behaviour(folder / TABLE, said.exits)


def table_of(texts: Sequence[Mapping[str, Any]], columns: Mapping[str, npt.NDArray[Any]]) -> pa.Table:
    """Texts (``sequence``, ``task``, ``prompt_tokens``, ``tokens``, ``end``) and per-token columns as one table."""
    import pyarrow as pa

    counts = np.array([text["tokens"] for text in texts])
    index = pa.array(np.repeat(np.arange(len(texts), dtype=np.int32), counts))

    def of_texts(name: str, kind: Any) -> pa.Array:
        return pa.array([text[name] for text in texts], kind).take(index)

    total = int(counts.sum())
    made = {
        "sequence": of_texts("sequence", pa.string()),
        "task": of_texts("task", pa.string()),
        "source": pa.array([ANY_SOURCE], pa.string()).take(pa.array(np.zeros(total, np.int32))),
        "prompt_tokens": of_texts("prompt_tokens", pa.int32()),
        "position": pa.array(np.concatenate([np.arange(n) for n in counts]), pa.int32()),
        "end": of_texts("end", pa.int32()),
        "token_id": pa.array(np.zeros(total), pa.int32()),
    }
    return pa.table({**made, **{name: pa.array(values) for name, values in columns.items()}})
