"""What is measured, in which order, under which bars and within how many seconds.

Bars are those of the acceptance of the real engine: they are about a GPU. On a CPU the same code runs on stand-ins,
and figures have no bar.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heliosim.errors import InputError, UnknownNameError

from .figures import Asked, Bar, without_bars

CPU_GRACE = 6.0
"""On a CPU a measure may take so many times its budget: what counts there is that it works, on a busy machine too."""
SYSTEMS = ("vanilla", "early-exit", "helios")
METRICS = {
    "step": ("step time", 0.05),
    "throughput": ("throughput", 0.05),
    "tpot": ("TPOT, mean", 0.05),
    "e2e": ("E2E, mean", 0.05),
    "e2e_p99": ("E2E, p99", 0.10),
    "ttft": ("TTFT, mean (or within 30 ms)", 0.10),
}


@dataclass(frozen=True)
class Options:
    """What was asked for. ``seconds``: the whole command may take; ``parts``: groups to run, empty: all."""

    device: str = "cuda"
    is_quick: bool = False
    seconds: float = 520.0
    seed: int = 0
    parts: tuple[str, ...] = ()
    trains_pair: bool = False
    dtype: str = "bfloat16"

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def loads(self) -> tuple[float, ...]:
        """Arrival rates as shares of capacity."""
        return (0.6,) if self.is_quick else (0.3, 0.6, 0.85)

    @property
    def repeats(self) -> int:
        return 3

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Options:
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "parts": tuple(values["parts"])})


@dataclass(frozen=True)
class Measure:
    """One thing to measure: ``module:function`` of this package, called with a ``book.Book``."""

    name: str
    title: str
    run: str
    seconds: float
    asked: tuple[Asked, ...] = ()


@dataclass(frozen=True)
class Group:
    """Measures that share a process, and with it an engine and its weights. ``start_s``: until the first one begins."""

    name: str
    title: str
    measures: tuple[Measure, ...]
    start_s: float = 10.0

    @property
    def seconds(self) -> float:
        return self.start_s + sum(m.seconds for m in self.measures)


@dataclass(frozen=True)
class Shape:
    """A model shape of random weights. ``ideal``: share of the weight-traffic ideal that decoding has to reach."""

    model: str
    exits: tuple[int, ...] = field(default=())
    ideal: float = 0.8


PREMISES = Asked("premises", "premises of HELIOS that hold", "of them")
PAIR = (Shape("opt-1.3b", (6, 12, 24), 0.5), Shape("opt-6.7b", (9, 17, 32)))
LLAMA = Shape("llama3-8b", (8, 16, 24, 32))


def groups(options: Options) -> list[Group]:
    """Everything there is to do, in order; with ``parts``, only those. Raises UnknownNameError."""
    made = [_machine(options), _tests(options), _pair(options), _llama(options), _tiny(options)]
    if options.trains_pair:
        made.append(_trained(options))
    if not options.is_gpu:
        made = [_without_bars(g) for g in made]
    known = [g.name for g in made]
    for part in options.parts:
        if part not in known:
            raise UnknownNameError("--parts", part, known)
    return [g for g in made if not options.parts or g.name in options.parts]


def _machine(options: Options) -> Group:
    return Group(
        "machine",
        "The machine",
        (
            Measure("facts", "Device, clocks, versions", "machine:facts", 5),
            Measure(
                "bandwidth",
                "Memory and host-to-device bandwidth",
                "machine:bandwidth",
                3 if options.is_quick else 10,
                (
                    Asked("device", "device memory, copied", "GB/s"),
                    Asked("pinned", "host to device, pinned", "GB/s"),
                    Asked("pageable", "host to device, pageable", "GB/s"),
                ),
            ),
        ),
    )


def _tests(options: Options) -> Group:
    none = Bar("at most", 0)
    asked = (Asked("failed", "tests that fail", "tests", none), Asked("passed", "tests that pass", "tests"))
    budget = 40.0 if options.is_quick else 75.0
    return Group("tests", "Tests", (Measure("pytest", "Tests on the device", "gputests:run", budget, asked),), 1)


def _roofline(shape: Shape, options: Options) -> tuple[Asked, ...]:
    """Batches of 1 to 16 and contexts up to 1,024 tokens."""
    bar = Bar("at least", shape.ideal)
    cells = ((1, 128), (8, 512)) if options.is_quick else ((1, 128), (1, 1024), (4, 512), (8, 512), (16, 1024))
    rows = (
        Asked(f"{shape.model}.ideal.{b}x{c}", f"{shape.model}: batch {b}, context {c}: share of the ideal", bar=bar)
        for b, c in cells
    )
    return (*rows, Asked(f"{shape.model}.step", f"{shape.model}: decode step, batch 1, context 128", "ms"))


def _linearity(shape: Shape) -> Asked:
    what = f"{shape.model}: largest departure of a fixed-depth step from d x layer + head"
    return Asked(f"{shape.model}.linearity", what, bar=Bar("at most", 0.05))


def _loading(shape: Shape) -> tuple[Asked, ...]:
    return (
        Asked(f"{shape.model}.load", f"{shape.model}: layer load, share of pinned bandwidth", bar=Bar("at least", 0.8)),
        Asked(f"{shape.model}.slowdown", f"{shape.model}: decode slowdown beside a load", bar=Bar("at most", 0.05)),
    )


def _calibration(models: Sequence[str]) -> tuple[Asked, ...]:
    return tuple(
        Asked(f"{name}.holdout", f"{name}: median error of held-out step times", bar=Bar("at most", 0.05))
        for name in models
    )


def _fidelity(options: Options) -> tuple[Asked, ...]:
    return tuple(
        Asked(f"{s}.{load:g}.{key}", f"{s}, {load:.0%} load: {what}, simulated over live", bar=Bar("at most", bar))
        for s in SYSTEMS
        for load in options.loads
        for key, (what, bar) in METRICS.items()
    )


def _pair(options: Options) -> Group:
    quick, names = options.is_quick, [s.model for s in PAIR]
    measures = (
        Measure("roofline", "Decode against weight traffic", "decode:roofline", 6 if quick else 25,
                tuple(a for s in PAIR for a in _roofline(s, options))),
        Measure("linearity", "Step time against depth", "decode:linearity", 4 if quick else 10,
                tuple(_linearity(s) for s in PAIR)),
        Measure("loading", "Layer loads", "loading:run", 4 if quick else 15,
                tuple(a for s in PAIR for a in _loading(s))),
        Measure("calibrate", "Calibration", "calibration:run", 20 if quick else 90, _calibration(names)),
        Measure("fidelity", "Live against simulated, replayed exits", "fidelity:run", 25 if quick else 110,
                _fidelity(options)),
    )  # fmt: skip
    return Group("opt-pair", "OPT-1.3B and OPT-6.7B, random weights", measures, 5 if quick else 25)


def _llama(options: Options) -> Group:
    quick = options.is_quick
    beside = (
        Asked("throughput.engine", "batch 64: this engine", "tokens/s"),
        Asked("throughput.generate", "batch 64: transformers generate, static cache", "tokens/s"),
        Asked("throughput.compiled", "batch 64: the same, compiled", "tokens/s"),
        Asked("throughput.batching", "batch 64: transformers generate_batch", "tokens/s"),
        Asked("throughput.ratio", "batch 64: this engine over the best generate", "x", Bar("at least", 2.0)),
    )
    measures = (
        Measure(
            "roofline",
            "Decode against weight traffic",
            "decode:roofline",
            4 if quick else 15,
            _roofline(LLAMA, options),
        ),
        Measure("linearity", "Step time against depth", "decode:linearity", 3 if quick else 6, (_linearity(LLAMA),)),
        Measure("loading", "Layer loads", "loading:run", 3 if quick else 8, _loading(LLAMA)),
        Measure("throughput", "Throughput beside transformers", "throughput:run", 10 if quick else 60, beside),
        Measure("calibrate", "Calibration", "calibration:run", 10 if quick else 45, _calibration([LLAMA.model])),
    )
    return Group("llama3-8b", "Llama-3-8B, random weights", measures, 5 if quick else 25)


def _tiny(options: Options) -> Group:
    quick = options.is_quick
    models = ("tiny-opt-s",) if quick else ("tiny-opt-s", "tiny-opt-l")
    asked = (*_calibration(models), PREMISES)
    measure = Measure("calibrate", "Calibration with real exits", "calibration:tiny", 15 if quick else 40, asked)
    return Group("tiny", "Tiny models that really exit early", (measure,), 5)


def _trained(options: Options) -> Group:
    asked = (
        Asked("train.loss", "held-out loss of the larger model", "nats"),
        Asked("train.early", "tokens of it that leave before the last layer"),
        Asked("train.agreement", "of those, what the last layer would have said too"),
    )
    seconds = 20 if options.is_quick else 180
    measures = (
        Measure("train", "Training", "training:run", seconds, asked),
        Measure("calibrate", "Calibration of that pair", "calibration:trained", 10 if options.is_quick else 40,
                (*_calibration(trained_names(options)), PREMISES)),
    )  # fmt: skip
    return Group("trained", "A pair trained here", measures, 5)


def trained_names(options: Options) -> tuple[str, str]:
    """The pair that is trained: smaller, larger."""
    return ("trained-30m", "trained-120m") if options.is_gpu else ("trained-s", "trained-l")


def _without_bars(group: Group) -> Group:
    """Failing tests fail anywhere; other bars are about a GPU."""
    if group.name == "tests":
        return group
    measures = tuple(
        Measure(m.name, m.title, m.run, m.seconds, tuple(without_bars(a) for a in m.asked)) for m in group.measures
    )
    return Group(group.name, group.title, measures, group.start_s)


def options_of(work: Path) -> Options | None:
    """The options that a work folder was made with; None: it is new."""
    file = work / "options.json"
    return Options.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def require_same(work: Path, options: Options) -> None:
    """Raise InputError if a work folder belongs to another kind of check. Time and choice of parts may change."""
    before = options_of(work)
    if before is None:
        return
    for name in ("device", "is_quick", "seed", "dtype"):
        if getattr(before, name) != getattr(options, name):
            problem = f"what was measured there has {name.replace('is_', '')} {getattr(before, name)}"
            raise InputError("--work", str(work), problem, "Give another --work, or --fresh to start over.")
