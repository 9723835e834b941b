"""README and docs/ speak of what exists: commands, options, links, parameters, metrics, columns, examples that run."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from heliosim.cli import app
from heliosim.costs import LOAD_TERMS, TERMS, StepShape
from heliosim.formats.files import validate
from heliosim.formats.profile import CostFit, ModelFacts, ProfileFile
from heliosim.formats.sweep import SweepFile
from heliosim.formats.tune import TuneFile
from heliosim.metrics import Summary
from heliosim.recorder import TableRecorder, schemas
from heliosim.registry import CONTROLLERS, ROUTERS
from heliosim.runs import run_simulated
from heliosim.scenario import BatcherSpec, Failure, Fleet, ReplicaGroup, Scenario, parse_controller
from heliosim.serving.helios import HeliosParameters
from heliosim.serving.kinds import Context
from heliosim.simulate import simulate_server
from heliosim.types import StepRecord
from heliosim.workload import OpenLoop, TaskSpec, WorkloadSpec
from tests.helpers import StubEngine, arrival, server, spec
from tests.profiles import scenario, workload, write_synthetic_profile

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HAND_WRITTEN = [page for page in PAGES if page.name not in ("validation.md", "reproduction.md")]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


@cache
def blocks() -> tuple[Block, ...]:
    return tuple(
        Block(page.name, language, text)
        for page in PAGES
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    )


def of_language(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages]


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def is_named(word: str, text: str) -> bool:
    """Whether a name stands in code marks, alone or as the end of a dotted path."""
    return re.search(rf"`(?:\w+\.)*{re.escape(word)}`", text) is not None


# --- commands -----------------------------------------------------------------------------------------------


def command_lines(in_text: bool = True) -> list[tuple[str, str]]:
    """(page, words behind ``heliosim``) of every command in blocks and, if ``in_text``, in code marks."""
    found = []
    for block in of_language("", "sh"):
        found += [(block.page, line[9:]) for line in block.text.splitlines() if line.startswith("heliosim ")]
    for page in PAGES if in_text else ():
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        found += [(page.name, words) for words in re.findall(r"`heliosim ([^`]+)`", text)]
    return found


def innermost(line: str) -> tuple[Any, list[str]]:
    """The command a line names, and the words behind its name."""
    words = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    return command, words


def problem_of(line: str) -> str | None:
    """What is wrong with a command line, or None. Arguments may be missing."""
    command, words = innermost(line)
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    known = {option: p for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("--")}
    position = 0
    while position < len(words):
        word, position = words[position], position + 1
        if not word.startswith("--") or word == "--help":
            continue
        name = word.split("=")[0]
        if name not in known:
            return f"{command.name} has no option {name}"
        if "=" not in word and not getattr(known[name], "is_flag", False):
            position += 1
    return None


def test_there_are_commands_to_check() -> None:
    assert {page for page, _ in command_lines()} >= {"README.md", "calibrating.md"}


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_exist_with_their_options(page: str, line: str) -> None:
    problem = problem_of(line)
    assert problem is None, f"{page}: heliosim {line}: {problem}"


@pytest.mark.parametrize("line", [line for _, line in command_lines(in_text=False)])
def test_commands_in_blocks_are_complete(line: str) -> None:
    """Required options and arguments are there and have the right type: the parser itself says so."""
    command, words = innermost(line)
    command.make_context(command.name, words)


@pytest.mark.parametrize("line", ["calibrate --rows 3", "profile sow x", "run x.yaml --clok cpu"])
def test_the_check_finds_mistakes(line: str) -> None:
    assert problem_of(line) is not None


def test_make_targets_exist() -> None:
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    shown = {line.split()[1] for b in of_language("") for line in b.text.splitlines() if line.startswith("make ")}
    assert {"demo", "test"} <= shown <= rules


# --- links --------------------------------------------------------------------------------------------------


def links() -> list[tuple[Path, str]]:
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    return [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not target.startswith(("http://", "https://"))
    ]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_links_resolve(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f"{page.name} links to {target}"
    if anchor:
        assert anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


# --- completeness -------------------------------------------------------------------------------------------


def test_every_controller_and_parameter_is_in_formats() -> None:
    text = page_text("formats.md")
    for kind in CONTROLLERS.builtin:
        assert is_named(kind, text), kind
        section = text.split(f"`{kind}`:", 1)[1].split("\n\n`", 1)[0]
        for field in fields(CONTROLLERS.get(kind)):
            assert is_named(field.name, section), f"{kind}.{field.name}"


def test_helios_defaults_are_those_of_the_code() -> None:
    section = page_text("formats.md").split("`helios`:", 1)[1].split("Types and names", 1)[0]
    shown = {name: default.strip("`") for name, default in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.M)}
    defaults = HeliosParameters()
    assert set(shown) == {f.name for f in fields(HeliosParameters)}
    for name, text in shown.items():
        value = getattr(defaults, name)
        if isinstance(value, str | bool | int | float):
            said = text.strip().strip("`")
            assert said == (str(value).lower() if isinstance(value, bool) else str(value)), name


def test_every_scenario_field_is_in_formats() -> None:
    text = page_text("formats.md")
    for model in (Scenario, WorkloadSpec, TaskSpec):
        for name in model.model_fields:
            assert is_named(name, text) or f"`{name}." in text, f"{model.__name__}.{name}"
    for name in BatcherSpec.model_fields:
        assert f"`batcher.{name}`" in text, name
    section = text.split("\n### Fleet\n", 1)[1].split("\n### ", 1)[0]
    for part in (Fleet, ReplicaGroup, Failure):
        for name in part.model_fields:
            assert is_named(name, section), f"{part.__name__}.{name}"


def test_every_router_is_in_fleets_and_formats() -> None:
    for page in ("fleets.md", "formats.md"):
        for name in ROUTERS.builtin:
            assert is_named(name, page_text(page)), f"{page}: {name}"


def test_every_field_of_sweep_and_tune_files_is_in_formats() -> None:
    text = page_text("formats.md")
    for model, heading in ((SweepFile, "Sweep file"), (TuneFile, "Tune file")):
        section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
        for name, field in model.model_fields.items():
            assert is_named(field.alias or name, section), f"{model.__name__}.{name}"


def test_every_profile_field_is_in_formats() -> None:
    text = page_text("formats.md")
    for model in (ProfileFile, ModelFacts, CostFit):
        for name in model.model_fields:
            assert is_named(name, text) or f"`{name}." in text, f"{model.__name__}.{name}"
    for name in (*TERMS, *LOAD_TERMS, *StepShape._fields):
        assert is_named(name, text), name


def test_every_column_is_in_formats() -> None:
    text = page_text("formats.md")
    names = ("requests", "steps", "tokens", "events")
    sections = {t: text.split(f"\n`{t}.parquet`", 1)[1].split("\n\n`", 1)[0] for t in names}
    for name in StepRecord._fields:
        assert is_named(name, sections["steps"]), name
    for table, section in sections.items():
        for name in getattr(schemas(), table).names:
            assert is_named(name, section), f"{table}.{name}"


def test_every_metric_is_in_metrics() -> None:
    text = page_text("metrics.md")
    for field in fields(Summary):
        assert is_named(field.name, text), field.name


# --- examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of_language("yaml"), ids=lambda b: b.page)
def test_files_are_valid(block: Block) -> None:
    content = yaml.safe_load(block.text)
    if "search" in content:
        validate(TuneFile, content, block.page)
    elif "base" in content:
        validate(SweepFile, content, block.page)
    else:
        validate(Scenario, content, block.page).controller_kind()


@pytest.mark.parametrize("block", of_language("python"), ids=lambda b: b.page)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.page, "exec")


def test_the_example_controller_is_found_and_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package shown in architecture.md, as an installer would lay it out, is found by its entry point and works."""
    import tomllib

    shown = [b for b in blocks() if b.page == "architecture.md"]
    code = next(b.text for b in shown if b.language == "python")
    project = tomllib.loads(next(b.text for b in shown if b.language == "toml"))
    group = project["project"]["entry-points"]["heliosim.controllers"]
    (tmp_path / "queue_depth.py").write_text(code, encoding="utf-8")
    info = tmp_path / "queue_depth-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: queue-depth\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"{name} = {target}" for name, target in group.items()]
    (info / "entry_points.txt").write_text("\n".join(["[heliosim.controllers]", *lines, ""]), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()

    kind = parse_controller({"kind": "queue-depth", "model": "m", "depth": 2, "long": 4}, "test")
    controller = kind.build(Context({"m": spec()}, lambda threshold: pytest.fail("no repository needed")))
    recorder = TableRecorder()
    engine = StubEngine(seconds=lambda run: 0.001 * run.placement.depth)
    serving = server(controller, max_batch=2, recorder=recorder)
    simulate_server(serving, engine, OpenLoop([arrival(k, 0.002 * k) for k in range(24)]))
    tables = recorder.tables()
    assert tables.requests["status"].to_pylist() == ["finished"] * 24
    loads = [(r["model"], r["depth"]) for r in tables.steps.to_pylist() if r["kind"] == "load"]
    assert loads[:2] == [("m", 6), ("m", 2)]
    assert loads[-1] == ("m", 6)
    assert "depth" in tables.events["kind"].to_pylist()

    # As any run has it, with a simulated engine: asked step by step, shown every token.
    profile = write_synthetic_profile(tmp_path / "synthetic")
    load = workload(requests=40) | {"arrivals": {"kind": "poisson", "rate_per_s": 300.0}}
    plan = scenario(profile, workload=load, controller={"kind": "queue-depth", "model": "large", "depth": 4, "long": 4})
    shown_tokens = []
    import queue_depth  # type: ignore[import-not-found]

    def observe(self: Any, now: float, run: Any, outcome: Any, served: Any, started: int) -> None:
        assert outcome.stride is None
        shown_tokens.append(len(outcome.tokens))

    monkeypatch.setattr(queue_depth.QueueDepthController, "observe", observe)
    found = run_simulated(plan, profile)
    assert sum(shown_tokens) == sum(found.requests["output_tokens"].to_pylist()) > 0
    single = run_simulated(plan, profile, max_stride=1)
    assert found.steps.equals(single.steps)
    assert found.requests.equals(single.requests)


def test_the_example_router_is_found_and_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package shown in fleets.md, as an installer would lay it out, is found by its entry point and works."""
    import tomllib

    shown = [b for b in blocks() if b.page == "fleets.md"]
    project = tomllib.loads(next(b.text for b in shown if b.language == "toml"))
    (tmp_path / "spill.py").write_text(next(b.text for b in shown if b.language == "python"), encoding="utf-8")
    info = tmp_path / "spill-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spill\nVersion: 1.0\n", encoding="utf-8")
    group = project["project"]["entry-points"]["heliosim.routers"]
    lines = [f"{name} = {target}" for name, target in group.items()]
    (info / "entry_points.txt").write_text("\n".join(["[heliosim.routers]", *lines, ""]), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()

    fleet = {"router": "spill", "replicas": [{"name": "r", "count": 3}]}
    plan = scenario(write_synthetic_profile(tmp_path / "p"), workload=workload(100, 600.0), fleet=fleet)
    served = Counter(run_simulated(plan).requests["replica"].to_pylist())
    assert served["r-0"] > served["r-1"] > served["r-2"]
    assert sum(served.values()) == 100


def test_the_shown_fleets_run() -> None:
    for block in [b for b in of_language("yaml") if b.page == "fleets.md"]:
        plan = validate(Scenario, yaml.safe_load(block.text), block.page)
        small = plan.workload.model_copy(update={"requests": 60})
        assert run_simulated(plan.model_copy(update={"workload": small})).counts["finished"] == 60


def test_pages_name_no_machine() -> None:
    """No absolute paths of anybody's machine, except below the home folder's cache."""
    for page in HAND_WRITTEN:
        found = re.findall(r"(?<![\w~.)])/(?:home|root|work|tmp|Users|opt)/\S*", page.read_text(encoding="utf-8"))
        assert not found, f"{page.name}: {found}"
