"""The profile: what is known of models on a device. A folder with one JSON file and two Parquet tables.

``profile.json`` holds provenance, sizes, fitted costs with their errors, load times and the largest batches: small,
sorted, made for diffs. ``steps.parquet`` holds every step measured; ``behaviour.parquet`` per-token confidences of
every exit of every model over the same texts. A profile holds facts, not decisions: any threshold or depth can be asked
about later. A profile is ``measured`` on the device it names, ``derived`` from figures that others published for these
very models, or ``composed`` of a model's shapes and a device's efficiency curves. One that was not measured says what
it rests on, and everything that shows it says so too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from heliosim.behaviour import REFERENCE, Behaviour, Text
from heliosim.behaviour_chains import ChainKind
from heliosim.costs import LATER_TERMS, LOAD_TERMS, TERMS, ExitCosts, StepCost, StepShape
from heliosim.curves import Curve
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.files import FolderKind, Strict, read_json, sha256_of, validate, without_none, write_json
from heliosim.formats.hardware_facts import HardwareFacts
from heliosim.noise import RecordedNoise
from heliosim.types import ModelSpec, StepPower

SCHEMA_VERSION: Literal[2] = 2
_FITS_KEPT = 4
READABLE_VERSIONS = (1, 2)
"""Schema 1 has no curves, no tensor parallelism and no ``layer_decode_context``; it reads as a profile without them."""
ClockName = Literal["cpu", "wall"]
ProfileKind = Literal["measured", "derived", "composed"]
ORIGINS: Mapping[ProfileKind, str] = {
    "measured": "measured",
    "derived": "derived, not measured",
    "composed": "composed, not measured",
}
"""What is said of a profile of each kind wherever its figures show."""
CAUTIONS: Mapping[ProfileKind, str] = {
    "derived": "Derived, not measured: step times come from published kernel times, exits are synthetic.",
    "composed": "Composed, not measured: step times come from shapes and a device's efficiency curves; exits, if any, "
    "are synthetic or another profile's.",
}
"""The same as a sentence; nothing need be said of a measured one."""


def least_sure(kinds: Iterable[ProfileKind]) -> ProfileKind:
    """What to say of several profiles at once: that of the one which is farthest from a measurement."""
    order: tuple[ProfileKind, ...] = ("measured", "derived", "composed")
    return max(kinds, key=order.index, default="measured")


class HoldOut(Strict):
    """Relative errors of predicted against measured step times on cells the fit never saw. A cell's measured time is
    the mean of its steps, which is what throughput rests on.
    """

    cells: int
    median_abs_error: float
    p90_abs_error: float
    mean_signed_error: float
    repeat_error: float | None = Field(
        default=None,
        description="half the median difference of a cell's mean between even and odd visits",
    )
    repeat_error_high: float | None = Field(
        default=None, description="upper end of its 95 % interval, cells drawn again"
    )
    by_region: dict[str, float] = Field(description="median absolute relative error by region")


class Curves(Strict):
    """Points (count, seconds) of piecewise-linear times that are added to those of the terms."""

    layer: tuple[tuple[float, float], ...] = Field(description="one layer's dense work against the step's tokens")
    head: tuple[tuple[float, float], ...] = Field(description="one check or final head against its rows")

    @field_validator("layer", "head")
    @classmethod
    def _is_a_curve(cls, value: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        Curve.of(value)
        return value


class ExitMethodFit(Strict):
    """Seconds of what only some exit methods do (``costs.ExitCosts``), and how many steps they rest on."""

    regroup: float = Field(ge=0, description="preparing a smaller batch in the middle of a step")
    copy_layer: float = Field(ge=0, description="copying KV up, per layer")
    copy_layer_token: float = Field(ge=0, description="copying KV up, per layer and token")
    steps: int


class CostFit(Strict):
    """Seconds per unit of each cost term, how many steps they rest on, and the region they saw."""

    seconds_per: dict[str, float]
    curves: Curves | None = Field(default=None, description="of composed profiles: times that are no straight lines")
    steps: int
    cell_spread: float = Field(description="median over cells of the relative interquartile range of repeats")
    max_rows: int
    max_context: int
    max_tokens: int
    holdout: HoldOut
    exit_methods: ExitMethodFit | None = None

    @field_validator("seconds_per")
    @classmethod
    def _known_terms(cls, value: dict[str, float]) -> dict[str, float]:
        if set(value) | LATER_TERMS != set(TERMS):
            raise ValueError(f"cost terms must be exactly {', '.join(TERMS)}")
        if not all(v >= 0 for v in value.values()):
            raise ValueError("cost terms must not be negative")
        return value

    @model_validator(mode="after")
    def _curves_reach_the_range(self) -> CostFit:
        if self.curves is not None:
            for name, most in (("layer", self.max_tokens), ("head", self.max_rows)):
                if (last := getattr(self.curves, name)[-1][0]) < most:
                    raise ValueError(f"the {name} curve ends at {last:g}, but the range of these costs at {most}")
        return self

    def cost(self) -> StepCost:
        coefficients = tuple(self.seconds_per.get(t, 0.0) for t in TERMS)
        layer = head = None
        if self.curves is not None:
            layer, head = Curve.of(self.curves.layer), Curve.of(self.curves.head)
        methods = self.exit_methods
        exits = None if methods is None else ExitCosts(methods.regroup, methods.copy_layer, methods.copy_layer_token)
        limits = (self.max_rows, self.max_context, self.max_tokens)
        return StepCost(coefficients, *limits, layer, head, exits)


class LoadFit(Strict):
    """Seconds per unit of each load term. ``loads``: measured loads the fit rests on; 0 and no error if derived.

    ``seconds_per_byte``: what a byte of weights takes from other places than those the fit saw to the device.
    """

    seconds_per: dict[str, float]
    loads: int
    median_abs_error: float | None
    seconds_per_byte: dict[Literal["pageable", "disk"], float] = Field(default_factory=dict)
    step_slowdown: float | None = Field(
        default=None, ge=1, description="a decode step's time while weights are under way over that alone"
    )

    @field_validator("seconds_per")
    @classmethod
    def _known_terms(cls, value: dict[str, float]) -> dict[str, float]:
        if set(value) != set(LOAD_TERMS):
            raise ValueError(f"load terms must be exactly {', '.join(LOAD_TERMS)}")
        if not all(v >= 0 for v in value.values()):
            raise ValueError("load terms must not be negative")
        return value


class LargestBatch(Strict):
    """Rows of ``context_tokens`` each that fitted beside ``depth`` layers in ``budget_bytes``, allocated for real."""

    depth: int
    context_tokens: int
    budget_bytes: int
    rows: int


class MemoryFacts(Strict):
    """Bytes of one rank beside weights and KV. ``max_rows``: most rows an engine serves at once; null: no own limit.
    ``sources``: where each figure comes from, by its name, or ``assumed`` with the reason.
    """

    activation_bytes_per_token: int = Field(default=0, ge=0, description="of the largest step's tokens")
    workspace_bytes: int = Field(default=0, ge=0)
    graph_bytes: int = Field(default=0, ge=0)
    request_bytes: int = Field(default=0, ge=0, description="of every request held, whatever its length")
    max_rows: int | None = Field(default=None, ge=1)
    sources: dict[str, str] = Field(default_factory=dict)


class ModelFacts(Strict):
    """One model: identity, sizes in bytes, costs by clock. ``weights``: those of a checkpoint, or ``random`` ones drawn
    with ``weights_seed``, whose texts and exits mean nothing.

    Sizes are those of one rank, the fullest, where ``tensor_parallel`` GPUs share each layer.
    """

    architecture: Literal["opt", "llama"]
    checkpoint: str
    weights_sha256: str
    weights: Literal["checkpoint", "random"] = "checkpoint"
    weights_seed: int | None = Field(default=None, ge=0)
    dtype: str
    tensor_parallel: int = Field(default=1, ge=1)
    layers: int
    exits: tuple[int, ...]
    exit_kind: Literal["fixed", "anywhere"]
    layer_bytes: int
    base_bytes: int
    exit_head_bytes: dict[int, int]
    kv_bytes_per_token_layer: int
    hidden_bytes: int
    max_context: int
    vocabulary: str
    step: dict[ClockName, CostFit]
    load: dict[ClockName, LoadFit]
    largest_batch: tuple[LargestBatch, ...]
    memory: MemoryFacts | None = Field(default=None, description="what is needed beside weights and KV, if known")

    def spec(self, name: str) -> ModelSpec:
        return ModelSpec(
            name=name,
            layers=self.layers,
            exits=self.exits,
            kind=self.exit_kind,
            layer_bytes=self.layer_bytes,
            base_bytes=self.base_bytes,
            kv_bytes_per_token_layer=self.kv_bytes_per_token_layer,
            hidden_bytes=self.hidden_bytes,
            max_context=self.max_context,
            vocabulary=self.vocabulary,
            exit_head_bytes=dict(self.exit_head_bytes),
            request_bytes=0 if self.memory is None else self.memory.request_bytes,
        )


class ModelPower(Strict):
    """Mean power of one GPU while it works with one model, W, where it differs from others."""

    decode_w: float = Field(ge=0)
    prefill_w: float | None = Field(default=None, ge=0)


class Energy(Strict):
    """Energy facts. ``source`` is ``unavailable`` where no meter can be read; then nothing else is given.

    Watts are those of one GPU (or of the device that a meter reads). A model draws them on every rank of its tensor
    parallelism; the rest of the ``gpus`` idle.
    """

    source: Literal["unavailable", "nvml", "rapl", "data-sheet", "published"]
    reason: str = ""
    idle_w: float | None = None
    busy_w: float | None = Field(default=None, description="mean power while stepping where idle power is unknown, W")
    joules_per_step_second: float | None = Field(default=None, description="mean power above idle while stepping, W")
    decode_w: float | None = Field(default=None, ge=0, description="mean power while decoding, W; else while stepping")
    prefill_w: float | None = Field(default=None, ge=0, description="mean power while reading, W; else while decoding")
    load_w: float | None = Field(default=None, ge=0, description="mean power during loads, W; else while decoding")
    gpus: int = Field(default=1, ge=1, description="GPUs that a server has; at least the ranks of its largest model")
    models: dict[str, ModelPower] = Field(default_factory=dict, description="power of models that differ from the rest")

    @property
    def busy_watts(self) -> float | None:
        """Mean power of one GPU while it steps, idle power included; None where it is not known."""
        if self.busy_w is not None:
            return self.busy_w
        if self.idle_w is None or self.joules_per_step_second is None:
            return self.decode_w
        return self.idle_w + self.joules_per_step_second


class References(Strict):
    """Given texts that every model was scored on (source ``reference``), and where the prompts came from."""

    tasks: dict[str, int] = Field(description="texts per task")
    tokens: int
    file: str | None = Field(default=None, description="name of the prompts file; null: built-in tasks")
    sha256: str | None = None
    passed_over: int = Field(default=0, description="prompts of the file that were too long")


class BehaviourFacts(Strict):
    """Where the per-token table came from."""

    tasks: dict[str, int] = Field(description="prompts per task")
    split: str
    tokens_per_text: int
    threshold: float
    sources: tuple[str, ...]
    rows: int
    references: References | None = Field(default=None, description="of tables that were measured on given texts too")

    @model_serializer(mode="wrap")
    def _without_what_is_new(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_none(handler(self), "references")


NO_BEHAVIOUR = BehaviourFacts(tasks={}, split="none", tokens_per_text=0, threshold=0.8, sources=(), rows=0)
"""Of a profile that knows times and sizes alone."""


class Source(Strict):
    """A published source that figures were derived from."""

    name: str
    used_for: str
    url: str
    licence: str


class Derivation(Strict):
    """How a derived profile came to be: what it rests on, what was assumed, what is made up, how it compares."""

    method: str
    sources: tuple[Source, ...] = Field(min_length=1)
    assumptions: tuple[str, ...]
    synthetic: tuple[str, ...] = Field(description="what is generated rather than derived")
    cross_checks: tuple[str, ...] = ()


class Composition(Strict):
    """What a composed profile was put together from. ``files``: digests of device and architecture files, by name."""

    device: str
    dtype: str
    tensor_parallel: dict[str, int] = Field(description="by model")
    host: str = Field(description="preset of host overhead per step: graph, compiled or eager")
    behaviour: str = Field(description="synthetic, none, or the profile whose behaviour was taken")
    files: dict[str, str] = Field(default_factory=dict)
    extrapolated: tuple[str, ...] = Field(default=(), description="what lies outside the fitted range, as allowed")


class ProfileFile(Strict):
    """Schema of profile.json."""

    schema_version: Literal[1, 2]
    kind: ProfileKind
    derivation: Derivation | None = Field(default=None, description="of profiles that were not measured")
    composition: Composition | None = Field(default=None, description="of composed profiles, and only of them")
    device: dict[str, str | int | float | None]
    versions: dict[str, str]
    seed: int
    models: dict[str, ModelFacts]
    energy: Energy
    behaviour: BehaviourFacts
    files: dict[str, str] = Field(description="sha256 of the tables beside this file")
    premises: list[dict[str, Any]] = Field(default_factory=list)
    hardware: HardwareFacts | None = Field(default=None, description="cells beside the steps, if they were measured")

    @model_validator(mode="after")
    def _says_where_it_comes_from(self) -> ProfileFile:
        if (self.kind != "measured") != (self.derivation is not None):
            raise ValueError("a derived or composed profile has a derivation, a measured one has none")
        if (self.kind == "composed") != (self.composition is not None):
            raise ValueError("a composed profile has a composition, others have none")
        return self


@dataclass(frozen=True)
class Profile:
    """A profile on disk and the questions it can answer."""

    folder: Path
    facts: ProfileFile

    @property
    def hash(self) -> str:
        """Digest of profile.json, which itself names the digests of the tables."""
        return sha256_of(self.folder / "profile.json")

    def model(self, name: str) -> ModelFacts:
        if name not in self.facts.models:
            raise UnknownNameError(f"{self.folder}: model", name, self.facts.models)
        return self.facts.models[name]

    def spec(self, name: str) -> ModelSpec:
        return self.model(name).spec(name)

    def step_cost(self, name: str, clock: ClockName) -> StepCost:
        fit: CostFit = self._on_clock(self.model(name).step, name, clock)
        return fit.cost()

    def load_cost(self, name: str, clock: ClockName) -> Mapping[str, float]:
        fit: LoadFit = self._on_clock(self.model(name).load, name, clock)
        return fit.seconds_per

    def seconds_per_byte(self, name: str, clock: ClockName, source: Literal["pageable", "disk"]) -> float:
        """What a byte of weights takes from pageable host memory or disk to the device, s. Raises InputError."""
        fit: LoadFit = self._on_clock(self.model(name).load, name, clock)
        if source not in fit.seconds_per_byte:
            where = f"{self.folder}: load.{clock}.seconds_per_byte of {name}"
            problem = f"the profile does not say what a byte from {source} takes"
            needs = "host_bytes" if source == "disk" else "host"
            remedy = f"Add it to profile.json, or leave memory.{needs} out."
            raise InputError(where, source, problem, remedy)
        return fit.seconds_per_byte[source]

    @property
    def busy_watts(self) -> float | None:
        """Mean power of one GPU while it steps, idle power included; None where it is not known."""
        return self.facts.energy.busy_watts

    @property
    def gpus(self) -> int:
        """GPUs of one server."""
        return max(self.facts.energy.gpus, *(m.tensor_parallel for m in self.facts.models.values()))

    def step_power(self, name: str) -> StepPower | None:
        """Power of a server's GPUs while it works with a model: its ranks busy, the others idle. None: not known, or
        some GPUs idle and what they draw is not known.
        """
        energy, ranks = self.facts.energy, self.model(name).tensor_parallel
        own, idle = energy.models.get(name), self.gpus - ranks
        decode_w = energy.busy_watts if energy.decode_w is None else energy.decode_w
        prefill_w = energy.prefill_w
        if own is not None:
            decode_w, prefill_w = own.decode_w, own.prefill_w
        if decode_w is None or (idle and energy.idle_w is None):
            return None
        rest_w = idle * (energy.idle_w or 0.0)
        each = (decode_w, *(decode_w if w is None else w for w in (prefill_w, energy.load_w)))
        return StepPower(*(ranks * w + rest_w for w in each))

    @property
    def idle_watts(self) -> float | None:
        """Power of a server's GPUs while none of them works; None: not known."""
        return None if self.facts.energy.idle_w is None else self.gpus * self.facts.energy.idle_w

    @property
    def is_measured(self) -> bool:
        """Whether its figures come from a calibration; else they were derived or composed."""
        return self.facts.kind == "measured"

    @property
    def random_models(self) -> tuple[str, ...]:
        """Models whose weights are random: their times and sizes are real, what they say is not."""
        return tuple(name for name, m in self.facts.models.items() if m.weights == "random")

    @property
    def origin(self) -> str:
        """What is said of it wherever it shows."""
        return ORIGINS[self.facts.kind]

    def clock(self) -> ClockName:
        """The clock a scenario over this profile should use: ``cpu`` where it was measured, else ``wall``."""
        return "cpu" if all("cpu" in m.step for m in self.facts.models.values()) else "wall"

    def _on_clock(self, fits: Mapping[ClockName, Any], name: str, clock: ClockName) -> Any:
        if clock not in fits:
            raise InputError(
                f"{self.folder}: costs of {name}",
                clock,
                "the profile was not measured on this clock",
                f"Set clock: {' or '.join(fits)}.",
            )
        return fits[clock]

    def noise(self, clock: ClockName) -> RecordedNoise:
        """The step-time noise of the calibration, in the order it was measured. Raises InputError for a bad table, and
        for a profile that was not measured, whose ratios (if any) are errors of a fit and no noise.
        """
        if not self.is_measured:
            remedy = "Leave step_noise out, or use a measured profile."
            problem = f"a {self.facts.kind} profile has no measured noise"
            raise InputError(f"{self.folder}: step_noise", clock, problem, remedy)
        if clock not in self._noise:
            self._noise[clock] = self._read_noise(clock)
        return self._noise[clock]

    @cached_property
    def _noise(self) -> dict[ClockName, RecordedNoise]:
        return {}

    def _read_noise(self, clock: ClockName) -> RecordedNoise:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.folder / "steps.parquet"
        try:
            table = pq.read_table(path)
            measured = table[f"{clock}_s"].to_pylist()
            shapes = shape_columns(table)
            models = table["model"].to_pylist()
        except (OSError, KeyError, pa.ArrowInvalid) as error:
            raise InputError(str(path), path.name, f"no step times to replay: {error}", "Calibrate again.") from None
        costs = {name: self.step_cost(name, clock) for name in self.facts.models}
        expected = [costs[m].seconds(StepShape(*s)) for m, s in zip(models, zip(*shapes, strict=True), strict=True)]
        known = [(m / e, e) for m, e in zip(measured, expected, strict=True) if m > 0 and e > 0]
        if not known:
            raise InputError(str(path), path.name, "holds no step to replay noise from", "Calibrate again.")
        return RecordedNoise(*zip(*known, strict=True))

    def with_step_costs(self, clock: ClockName, seconds_per: Mapping[str, Mapping[str, float]]) -> Profile:
        """This profile with other step costs, by model and term; its tables and recorded noise are shared."""
        models = dict(self.facts.models)
        for name, terms in seconds_per.items():
            fit = models[name].step[clock].model_copy(update={"seconds_per": dict(terms)})
            models[name] = models[name].model_copy(update={"step": {**models[name].step, clock: fit}})
        changed = Profile(self.folder, self.facts.model_copy(update={"models": models}))
        self.noise(clock)
        vars(changed).update(behaviour=self.behaviour, _noise=self._noise)
        return changed

    def with_behaviour(self, behaviour: Behaviour, facts: BehaviourFacts) -> Profile:
        """This profile with other exits and texts; its folder, and so its hash, stay."""
        changed = Profile(self.folder, self.facts.model_copy(update={"behaviour": facts, "premises": []}))
        vars(changed).update(behaviour=behaviour, _noise=self._noise)
        return changed

    @property
    def has_behaviour(self) -> bool:
        """Whether it knows exits; without, only time can be simulated."""
        return self.facts.behaviour.rows > 0

    def require_behaviour(self) -> None:
        """Raise InputError if it knows no exits."""
        if not self.has_behaviour:
            remedy = "Serve vanilla or at a fixed depth, or compose the profile again with --behaviour."
            if self.random_models:
                remedy = "Its weights are random. Serve vanilla or at a fixed depth, or give exits with --replay-exits."
            raise InputError(f"{self.folder}: behaviour", "none", "the profile knows no exits", remedy)

    @cached_property
    def behaviour(self) -> Behaviour:
        self.require_behaviour()
        return load_behaviour(self.folder / "behaviour.parquet", {n: m.exits for n, m in self.facts.models.items()})

    def fitted_behaviour(self, kind: ChainKind, models: Sequence[str], threshold: float, seed: int) -> Behaviour:
        """Texts drawn from a model fitted to the behaviour (``behaviour_fit``); the last few are kept."""
        from heliosim.behaviour_fit import fitted_behaviour

        key = (kind, tuple(models), threshold, seed)
        if key not in self._fitted:
            while len(self._fitted) >= _FITS_KEPT:
                self._fitted.pop(next(iter(self._fitted)))
            self._fitted[key] = fitted_behaviour(self.behaviour, models, kind, threshold, seed)
        return self._fitted[key]

    @cached_property
    def _fitted(self) -> dict[tuple[str, tuple[str, ...], float, int], Behaviour]:
        return {}


def shared_hash(hashes: Sequence[str]) -> str:
    """What a run of several profiles names: the hash all of them have, else a digest of theirs, in order."""
    if len(set(hashes)) == 1:
        return hashes[0]
    return hashlib.blake2b(" ".join(hashes).encode(), digest_size=16).hexdigest()


def load_profile(folder: Path, *, verify: bool = True) -> Profile:
    """Read and check a profile. Raises InputError naming file, field, value and remedy if anything is wrong."""
    path = folder / "profile.json"
    if not folder.is_dir() or not path.exists():
        raise InputError(
            str(folder),
            folder.name,
            "no profile here",
            "Make one with: heliosim calibrate --out FOLDER, or heliosim profile compose.",
        )
    raw = read_json(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in READABLE_VERSIONS:
        reads = " and ".join(map(str, READABLE_VERSIONS))
        raise InputError(f"{path}, field schema_version", version, f"this version reads {reads}", "Calibrate again.")
    facts = validate(ProfileFile, raw, str(path))
    for name, digest in facts.files.items() if verify else ():
        table = folder / name
        if not table.exists():
            raise InputError(f"{path}, field files", name, "the table is missing", "Restore it or calibrate again.")
        if sha256_of(table) != digest:
            raise InputError(f"{path}, field files.{name}", digest, "the table was changed since", "Calibrate again.")
    return Profile(folder, facts)


def shape_columns(table: Any) -> list[list[int]]:
    """The columns of ``StepShape`` in a table of steps. Tables of schema 1 have no ``context``: 0, which nothing there
    costs. Raises KeyError for another column that is missing.
    """
    absent = [0] * table.num_rows if "context" not in table.column_names else None
    columns = ((name, absent if name == "context" else None) for name in StepShape._fields)
    return [table[name].to_pylist() if zeros is None else zeros for name, zeros in columns]


PROFILE_FOLDER = FolderKind(
    "a profile",
    "profile.json",
    frozenset(
        {
            "profile.json",
            "behaviour.parquet",
            "steps.parquet",
            "hardware.parquet",
            "behaviour.html",
            "calibration.html",
            "calibration.md",
        }
    ),
)


def write_profile(folder: Path, facts: ProfileFile) -> None:
    """Write profile.json into a folder that already holds the tables."""
    write_json(folder / "profile.json", without_none(facts.model_dump(mode="json"), "hardware"))


def load_behaviour(path: Path, exits: Mapping[str, tuple[int, ...]]) -> Behaviour:
    """Read what a simulation replays of a behaviour table: rows grouped by (sequence, source), in order of position.
    References are left out where there are texts of policies.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(str(path), path.name, f"not a readable table: {error}", "Calibrate again.") from None
    names = set(table.column_names)
    keys = [f"{model}@{e}" for model, layers in exits.items() for e in layers]
    absent = [k for k in keys if f"confidence:{k}" not in names]
    if absent:
        raise InputError(
            f"{path}, columns", absent[0], "no confidences for this exit", "Calibrate again with this model."
        )
    wanted = ("sequence", "source", "task", "prompt_tokens", "end", *(f"agrees:{k}" for k in keys))
    if missing := [c for c in wanted if c not in names]:
        raise InputError(f"{path}, columns", missing[0], "missing column", "Calibrate again.")
    sequence = np.asarray(table["sequence"].to_pylist(), dtype=object)
    source = np.asarray(table["source"].to_pylist(), dtype=object)
    change = np.flatnonzero((sequence[1:] != sequence[:-1]) | (source[1:] != source[:-1])) + 1
    bounds = [0, *change.tolist(), len(sequence)]
    has_policies = bool((source != REFERENCE).any())
    confidence = {k: table[f"confidence:{k}"].to_numpy() for k in keys}
    agrees = {k: table[f"agrees:{k}"].to_numpy() for k in keys}
    tasks, prompts, ends = (table[c].to_pylist() for c in ("task", "prompt_tokens", "end"))
    texts: dict[tuple[str, str], Text] = {}
    sequences: dict[str, list[str]] = {}
    for a, b in pairwise(bounds):
        if a == b or (has_policies and source[a] == REFERENCE):
            continue
        texts[sequence[a], source[a]] = Text(
            task=tasks[a],
            prompt_tokens=prompts[a],
            tokens=b - a,
            end=ends[a],
            confidence={k: v[a:b] for k, v in confidence.items()},
            agrees={k: v[a:b] for k, v in agrees.items()},
        )
        group = sequences.setdefault(tasks[a], [])
        if sequence[a] not in group:
            group.append(sequence[a])
    return Behaviour(texts, sequences, exits)
