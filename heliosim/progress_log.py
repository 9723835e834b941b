"""A live run's progress as JSON lines, written about once a second beside its folder, and read while it grows.

The first line says what runs; each later one is cumulative, so that a reader may skip any. Predicted step seconds are
the profile's for the shapes of the steps that really ran.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from heliosim.costs import shape_of
from heliosim.errors import InputError
from heliosim.exits.pricing import is_plain
from heliosim.formats.files import Strict, input_error
from heliosim.formats.profile import Profile
from heliosim.recorder import TableRecorder
from heliosim.scenario import Scenario
from heliosim.stats import Interval, t_interval
from heliosim.types import Load, Outcome, Run, Seconds, Served, StepRecord, StrideRecord

M = TypeVar("M", bound=Strict)
EVERY_S = 1.0
MOST_BYTES = 16 * 2**20
WINDOW, DRIFT_LIMIT = 20, 0.10
"""Lines that the rolling ratio looks back, and how far beyond 1 its interval must lie to be called drift."""


def log_path(run_folder: Path) -> Path:
    """Where the progress of a run is kept: ``OUT.live.jsonl`` beside ``OUT``."""
    return run_folder.with_name(f"{run_folder.name}.live.jsonl")


class LogHeader(Strict):
    """The first line: what runs."""

    schema_version: Literal[1] = 1
    name: str
    clock: Literal["cpu", "wall"]
    seed: int
    scenario_hash: str
    scenario: str
    profile_hash: str
    replayed_exits: str = ""


class LogLine(Strict):
    """Everything up to ``now_s`` on the run's clock. ``priced_steps``: single steps whose time the profile's costs say;
    ``measured_step_s`` and ``predicted_step_s`` are theirs. Means are over finished requests, None without one.
    """

    now_s: float = Field(ge=0, allow_inf_nan=False)
    finished: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    running: int = Field(ge=0)
    waiting: int = Field(ge=0)
    placement: str
    weights_bytes: int = Field(ge=0)
    kv_used_bytes: int = Field(ge=0)
    kv_total_bytes: int = Field(ge=0)
    mean_ttft_s: float | None = Field(ge=0, allow_inf_nan=False)
    mean_tpot_s: float | None = Field(ge=0, allow_inf_nan=False)
    steps: int = Field(ge=0)
    priced_steps: int = Field(ge=0)
    measured_step_s: float = Field(ge=0, allow_inf_nan=False)
    predicted_step_s: float = Field(ge=0, allow_inf_nan=False)
    has_ended: bool = False


class LoggingRecorder(TableRecorder):
    """Keeps a run's tables, and says how it goes in a file. Raises InputError if the file cannot be written."""

    def __init__(
        self, path: Path, scenario: Scenario, profile: Profile, replayed: str = "", every_s: float = EVERY_S
    ) -> None:
        super().__init__()
        assert scenario.clock in ("cpu", "wall")
        header = LogHeader(
            name=scenario.name,
            clock=scenario.clock,
            seed=scenario.seed,
            scenario_hash=scenario.hash,
            scenario=scenario.to_yaml(),
            profile_hash=profile.hash,
            replayed_exits=replayed,
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(
                str(path), path.name, f"cannot be written ({error.strerror})", "Choose another --out."
            ) from None
        self._costs = {n: profile.step_cost(n, scenario.clock) for n in scenario.models}
        self._specs = {n: profile.spec(n) for n in scenario.models}
        self._every_s, self._due = every_s, time.monotonic() + every_s
        self._state = ("", 0, 0, 0, 0, 0)
        self._now: Seconds = 0.0
        self._steps = self._tokens_out = self._finished = self._spaced = self._priced = 0
        self._ttft = self._tpot = self._measured = self._predicted = 0.0
        self._pending: list[tuple[Run, Outcome]] = []
        self._put(header)

    def tokens(self, now: Seconds, action: Run | Load, outcome: Outcome) -> None:
        super().tokens(now, action, outcome)
        if isinstance(action, Run) and outcome.stride is None and is_plain(action.exits):
            self._pending.append((action, outcome))

    def step(self, record: StepRecord) -> None:
        super().step(record)
        if record.kind == "run":
            self._steps += 1
        self._tokens_out += record.tokens_out
        place = f"{record.model}@{record.depth}"
        kv = (record.kv_used_bytes, record.kv_total_bytes)
        self._state = (place, record.running, record.waiting, record.weights_bytes, *kv)
        self._tick(record.start_s + record.seconds)

    def stride(self, record: StrideRecord) -> None:
        super().stride(record)
        steps, setting = record.stride.steps, record.setting
        self._steps += len(steps)
        self._tokens_out += sum(step.tokens_out for step in steps)
        kv = (record.kv_blocks[-1] * record.block_bytes, setting.kv_total_bytes)
        place = f"{setting.model}@{setting.depth}"
        self._state = (place, record.running[-1], record.waiting[-1], setting.weights_bytes, *kv)
        self._tick(record.start_s + sum(step.seconds for step in steps))

    def served(self, record: Served) -> None:
        super().served(record)
        if record.status != "finished" or record.first_token_s is None:
            return
        self._finished += 1
        self._ttft += record.first_token_s - record.arrival_s
        if record.output_tokens > 1:
            self._spaced += 1
            self._tpot += (record.finish_s - record.first_token_s) / (record.output_tokens - 1)

    def close(self, has_ended: bool) -> None:
        """Write the last line, and close the file."""
        if not self._file.closed:
            self._say(has_ended)
            self._file.close()

    def _tick(self, now: Seconds) -> None:
        self._now = now
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every_s
            self._say(False)

    def _say(self, has_ended: bool) -> None:
        for action, outcome in self._pending:
            model = action.placement.model
            self._predicted += self._costs[model].seconds(shape_of(action, outcome, self._specs[model]))
            self._measured += outcome.seconds
        self._priced += len(self._pending)
        self._pending.clear()
        place, running, waiting, weights, kv_used, kv_total = self._state
        self._put(
            LogLine(
                now_s=self._now,
                finished=self._finished,
                output_tokens=self._tokens_out,
                running=running,
                waiting=waiting,
                placement=place,
                weights_bytes=weights,
                kv_used_bytes=kv_used,
                kv_total_bytes=kv_total,
                mean_ttft_s=self._ttft / self._finished if self._finished else None,
                mean_tpot_s=self._tpot / self._spaced if self._spaced else None,
                steps=self._steps,
                priced_steps=self._priced,
                measured_step_s=self._measured,
                predicted_step_s=self._predicted,
                has_ended=has_ended,
            )
        )

    def _put(self, line: Strict) -> None:
        self._file.write(json.dumps(line.model_dump(mode="json"), allow_nan=False) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class ProgressLog:
    """A log as far as it has been written."""

    header: LogHeader
    lines: tuple[LogLine, ...]

    @property
    def has_ended(self) -> bool:
        return bool(self.lines) and self.lines[-1].has_ended


def read_log(path: Path) -> ProgressLog:
    """A log so far; a last line that is only half there is left for later. Raises InputError for what is no log, is
    larger than ``MOST_BYTES`` or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(str(path), path.name, f"cannot be read ({error.strerror})", "Name a live log.") from None
    if len(content) > MOST_BYTES:
        raise InputError(str(path), path.name, f"is larger than {MOST_BYTES >> 20} MiB", "Read its run folder instead.")
    rows = content.split(b"\n")[:-1]
    if not rows:
        raise InputError(str(path), path.name, "has no line yet", "Wait until the run has begun.")
    header = _parsed(LogHeader, rows[0], path, 1)
    return ProgressLog(header, tuple(_parsed(LogLine, row, path, k) for k, row in enumerate(rows[1:], 2)))


def _parsed(model: type[M], row: bytes, path: Path, number: int) -> M:
    where = f"{path.name} line {number}"
    try:
        return model.model_validate_json(row, strict=True)
    except ValidationError as error:
        raise input_error(error, where, model) from None


def rolling_ratio(lines: Sequence[LogLine], window: int = WINDOW) -> Interval:
    """Measured over predicted step seconds between neighbours of the last ``window`` + 1 lines, mean with interval."""
    last = lines[-window - 1 :]
    found: list[float | None] = []
    for before, after in pairwise(last):
        predicted = after.predicted_step_s - before.predicted_step_s
        if predicted > 0:
            found.append((after.measured_step_s - before.measured_step_s) / predicted)
    return t_interval(found)


def has_drifted(ratio: Interval, limit: float = DRIFT_LIMIT) -> bool:
    """Whether the whole interval lies more than ``limit`` away from 1."""
    low, high = ratio.low, ratio.high
    return low is not None and high is not None and (low > 1 + limit or high < 1 - limit)
