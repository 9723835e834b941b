"""The run folder: everything known of one run, from which every number and figure is computed.

``scenario.yaml`` (what was run) · ``run.json`` (how: mode, clock, seed, versions, hashes, counts, digests of
the tables) · ``requests.parquet``, ``steps.parquet``, ``tokens.parquet``, ``events.parquet`` (see
``recorder.schemas``) · ``host.json`` (where, and how long it took). The same run gives the same bytes in
every file but ``host.json``, which is the only one that speaks of the machine and of time spent. Warm-up is a
filter of the metrics; nothing is erased here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from heliosim.errors import InputError
from heliosim.formats.files import (
    FolderKind,
    Strict,
    new_folder,
    read_json,
    sha256_of,
    validate,
    write_json,
    write_text,
)
from heliosim.formats.profile import ProfileKind
from heliosim.recorder import TableRecorder, Tables, schemas
from heliosim.types import RequestId

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2
TABLES = ("requests", "steps", "tokens", "events")
LATER_COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "requests": {"priority": 0, "predicted_tokens": None, "recomputed_tokens": None}
}
"""Columns that older folders lack, and what stands there then; the last ones of their tables, in this order."""
RUN_FOLDER = FolderKind(
    "a run",
    "run.json",
    frozenset(
        {"run.json", "host.json", "scenario.yaml", "summary.json", "replications.json", "replications.parquet"}
        | {f"{name}.parquet" for name in TABLES}
    ),
)
"""Also what a sweep and replications write beside a run."""
DEFAULT_THRESHOLD = 0.8
"""Confidence threshold TH where a scenario's controller names none: the default of every controller."""

Mode = Literal["simulated", "live"]
RunClock = Literal["simulated", "cpu", "wall"]
_REMEDY = "Run the scenario again."


class Deployed(Strict):
    """What a server runs on: ``count`` alike, each with so many GPUs of a kind, which idle at ``idle_w`` W together.

    None: no GPU, or not known.
    """

    count: int = 1
    gpu: str | None = None
    gpus: int = 1
    idle_w: float | None = None


class RunInfo(Strict):
    """What a run is: nothing in it depends on the machine's load or on the time of day.

    ``clock``: ``simulated``; or for live runs ``cpu`` (each step charged the processor time it took) or
    ``wall``. ``profile_kind``: whether the profile was ``measured``, ``derived`` from published figures or ``composed``
    of shapes and a device's efficiency curves.
    ``quality_unknown``: exit methods of a simulated run that the profile has no texts of; its figures of quality would
    be those of other methods, and are not given. ``replayed_exits``: where the exits of a run come from that are
    neither its models' nor its profile's own. ``deployed``: what serves, by group of a fleet (``replica`` without
    one); empty in folders of older versions. ``behaviour``: ``replay`` of recorded texts, or the kind of fitted model
    that a simulated run's exits were drawn from.
    """

    schema_version: Literal[2] = 2
    name: str
    mode: Mode
    clock: RunClock
    seed: int
    scenario_hash: str
    profile_hash: str
    profile_kind: ProfileKind = "measured"
    quality_unknown: str = ""
    replayed_exits: str = ""
    versions: dict[str, str]
    deployed: dict[str, Deployed] = Field(default_factory=dict)
    behaviour: Literal["replay", "iid", "markov", "markov-request"] = "replay"

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was added later is written where it says something, so that older files stay as they are."""
        content: dict[str, Any] = handler(self)
        if content.get("behaviour") == "replay":
            del content["behaviour"]
        if not content.get("replayed_exits"):
            content.pop("replayed_exits", None)
        return content


def replay_caution(runs: Iterable[RunInfo]) -> str:
    """What must be said of runs whose exits were replayed, as a sentence; nothing of others."""
    named = sorted({run.replayed_exits for run in runs if run.replayed_exits})
    if not named:
        return ""
    return (
        f"Exits replayed from {', '.join(named)}: confidences, breaches, output lengths and quality are those of that "
        "record, not what the served weights said."
    )


class RunFile(RunInfo):
    """Schema of run.json: the facts, and what the tables beside it hold."""

    counts: dict[str, int]
    files: dict[str, str]


@dataclass(frozen=True)
class RunResults:
    """One run in memory: as it came from a recorder, or as read from a folder.

    ``host``: facts of the machine and seconds spent (``wall_s``, ``cpu_s``), kept apart because they never
    repeat.
    """

    info: RunInfo
    scenario_yaml: str
    requests: pa.Table
    steps: pa.Table
    tokens: pa.Table
    events: pa.Table
    host: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        recorder: TableRecorder,
        info: RunInfo,
        scenario_yaml: str,
        *,
        tasks: Mapping[RequestId, str] | None = None,
        host: Mapping[str, Any] | None = None,
    ) -> RunResults:
        """Results of a run that just ended. ``tasks`` names the task of each request."""
        made: Tables = recorder.tables(tasks)
        return cls(info, scenario_yaml, made.requests, made.steps, made.tokens, made.events, dict(host or {}))

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each table, and how many requests finished or were refused."""
        status = self.requests["status"].to_pylist()
        rows = {name: getattr(self, name).num_rows for name in TABLES}
        return {**rows, "finished": status.count("finished"), "refused": status.count("refused")}

    @cached_property
    def scenario(self) -> Mapping[str, Any]:
        """The scenario as plain data, unvalidated; empty if the text is not a mapping."""
        import yaml

        try:
            value = yaml.safe_load(self.scenario_yaml)
        except yaml.YAMLError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def threshold(self) -> float:
        """Confidence threshold TH of the run's controller."""
        value = _section(self.scenario, "controller").get("threshold")
        return float(value) if isinstance(value, (int, float)) else DEFAULT_THRESHOLD

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Thresholds of replicas whose group has a controller of its own; those left out have the run's."""
        found: dict[str, float] = {}
        for group, names in _groups(self.scenario):
            controller = group.get("controller")
            if isinstance(controller, dict):
                value = controller.get("threshold")
                limit = float(value) if isinstance(value, (int, float)) else DEFAULT_THRESHOLD
                found |= dict.fromkeys(names, limit)
        return found

    @property
    def max_breaches(self) -> int | None:
        """CBCmax of a HELIOS controller, as the scenario states it or by default; None for controllers that
        count none.
        """
        controller = _section(self.scenario, "controller")
        value = controller.get("max_breaches", 50 if controller.get("kind") == "helios" else None)
        return value if isinstance(value, int) else None

    @property
    def budget_bytes(self) -> int | None:
        """Device memory for weights and KV, bytes, of all replicas; None if the scenario does not say."""
        value = _section(self.scenario, "memory").get("budget_bytes")
        if not isinstance(value, int):
            return None
        groups = _groups(self.scenario)
        own = [_section(group, "memory").get("budget_bytes", value) * len(names) for group, names in groups]
        return sum(own) if groups else value


def _groups(scenario: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Groups of a fleet as plain data, with the names of their replicas; none without a fleet."""
    groups = _section(scenario, "fleet").get("replicas", ())
    return [(group, [f"{group['name']}-{k}" for k in range(group.get("count", 1))]) for group in groups]


def _section(scenario: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = scenario.get(name)
    return value if isinstance(value, dict) else {}


def save_run(
    folder: Path,
    results: RunResults,
    *,
    overwrite: bool = False,
    tables: Sequence[str] = TABLES,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a run folder: all of it or nothing.

    ``tables``: those to keep; a folder without one cannot be loaded, only looked at. ``beside``: JSON files to write
    along, by name. Raises InputError if ``folder`` exists, unless ``overwrite``: then the old run is replaced once the
    new one is complete.
    """
    with new_folder(folder, RUN_FOLDER, overwrite=overwrite) as temporary:
        write_text(temporary / "scenario.yaml", results.scenario_yaml)
        for name in tables:
            write_table(temporary / f"{name}.parquet", getattr(results, name))
        for name, value in (beside or {}).items():
            write_json(temporary / name, value)
        digests = {p.name: sha256_of(p) for p in sorted(temporary.iterdir())}
        run = RunFile(**results.info.model_dump(), counts=results.counts, files=digests)
        write_json(temporary / "run.json", run.model_dump(mode="json"))
        write_json(temporary / "host.json", dict(results.host))


def load_run(folder: Path, *, verify: bool = True) -> RunResults:
    """Read a run folder. Raises InputError naming the file if one is missing, unreadable, changed, or of
    another schema version.

    ``verify=False`` skips the digests of the files, not their schema.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise InputError(
            str(folder),
            folder.name,
            "no run here (run.json is missing)",
            "Give the folder a run was saved to.",
        )
    run = read_info(path)
    for name, digest in run.files.items() if verify else ():
        _require(folder / name)
        if sha256_of(folder / name) != digest:
            raise InputError(str(folder / name), name, "the file was changed or damaged since the run", _REMEDY)
    tables = {name: _read_table(folder / f"{name}.parquet", name) for name in TABLES}
    host = read_json(folder / "host.json") if (folder / "host.json").is_file() else {}
    if not isinstance(host, dict):
        raise InputError(str(folder / "host.json"), host, "not a JSON object", "Remove the file; it is optional.")
    info = RunInfo(**run.model_dump(exclude={"counts", "files"}))
    return RunResults(info=info, scenario_yaml=_read_text(folder / "scenario.yaml"), host=host, **tables)


def read_info(path: Path) -> RunFile:
    """What run.json says. Raises InputError."""
    raw = read_json(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}, field schema_version", version, f"this version reads {SCHEMA_VERSION}", _REMEDY)
    return validate(RunFile, raw, str(path))


def _require(path: Path) -> None:
    if not path.is_file():
        raise InputError(str(path), path.name, "the file is missing from the run folder", _REMEDY)


def _read_text(path: Path) -> str:
    _require(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(str(path), path.name, f"not UTF-8 text: {error.reason}", _REMEDY) from None


def _read_table(path: Path, name: str) -> pa.Table:
    """One table, with exactly the columns of its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _require(path)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(str(path), path.name, f"not a readable table: {reason}", _REMEDY) from None
    wanted = getattr(schemas(), name)
    for column, value in LATER_COLUMNS.get(name, {}).items():
        if column not in table.schema.names:
            of = wanted.field(column)
            kept = (
                pa.nulls(table.num_rows, of.type)
                if value is None
                else pa.repeat(pa.scalar(value, of.type), table.num_rows)
            )
            table = table.append_column(of, kept)
    if table.schema.names != wanted.names:
        odd = sorted(set(table.schema.names) ^ set(wanted.names)) or table.schema.names
        raise InputError(f"{path}, columns", odd[0], "missing, unknown or misplaced column", _REMEDY)
    try:
        return table.cast(wanted)
    except (pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}, columns", path.name, f"wrong type: {reason}", _REMEDY) from None


def write_table(path: Path, table: pa.Table) -> None:
    """Parquet with every setting fixed: equal content gives equal bytes (under one version of pyarrow)."""
    import pyarrow.parquet as pq

    pq.write_table(
        table.combine_chunks().replace_schema_metadata(None),
        path,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
        row_group_size=1 << 20,
        store_schema=True,
    )
