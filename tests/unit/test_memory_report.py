"""The KV cliff drawn: the lines are the byte model's and the costs', nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from heliosim.cli import app
from heliosim.formats.profile import MemoryFacts, Profile
from heliosim.memory_model import cliff, largest_batch, needs_of
from heliosim.memory_report import cliff_data, context_figure, depth_figure, write_memory_report
from tests.profiles import write_synthetic_profile

BUDGET, STEP = 16_000, 64


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    memory = MemoryFacts(workspace_bytes=500, request_bytes=100, sources={"workspace_bytes": "assumed"})
    return write_synthetic_profile(tmp_path_factory.mktemp("p") / "needy", max_rows=64, memory=memory)


def test_lines_by_context_are_what_fits(profile: Profile) -> None:
    data = cliff_data(profile, BUDGET, (32, 128), 40, STEP)
    assert sorted(set(data.by_context["context"])) == [64, 128, 256]
    facts = profile.model("large")
    spec, needs = facts.spec("large"), needs_of(facts, STEP)
    lines = {t.name: t for t in context_figure(data).data if t.showlegend and t.name}
    for depth in spec.exits:
        fits = [min(40, largest_batch(spec, depth, c, BUDGET, needs)) for c in (64, 128, 256)]
        assert list(lines[f"large, layer {depth}"].y) == [rows for rows in fits if rows]
    assert list(lines["rows wanted"].y) == [40, 40]


def test_lines_by_depth_reach_over_all_layers_that_fit(profile: Profile) -> None:
    data = cliff_data(profile, BUDGET, (32, 128, 100_000), 40, STEP)
    assert sorted(set(data.by_depth["context"])) == [32, 128]
    figure = depth_figure(data)
    lines = [t for t in figure.data if t.name == "small, 128 tokens" and t.line.dash is None]
    counts, seconds = lines
    spec, cost = profile.spec("small"), profile.step_cost("small", profile.clock())
    needs = needs_of(profile.model("small"), STEP)
    rows = cliff(spec, cost, BUDGET, (128,), 40, needs, range(1, 7))
    assert list(seconds.x) == [1, 2, 3, 4, 5, 6]
    assert list(seconds.y) == pytest.approx([row.tok_per_s for row in rows])
    assert list(counts.y) == [row.rows for row in rows] == sorted((row.rows for row in rows), reverse=True)
    assert rows[-1].rows < rows[0].rows


def test_a_depth_that_does_not_fit_is_not_drawn(profile: Profile) -> None:
    data = cliff_data(profile, 8_000, (32,), 40, STEP)
    deepest = data.by_context[(data.by_context["model"] == "large") & (data.by_context["depth"] == 12)]
    assert set(deepest["rows"]) == {0}
    lines = [t for t in context_figure(data).data if t.name == "large, layer 12" and t.showlegend]
    assert [list(t.x) for t in lines] == [[]]


def test_the_page_says_what_it_rests_on(profile: Profile, tmp_path: Path) -> None:
    write_memory_report(profile, tmp_path / "memory.html", BUDGET, (32, 128), 40, STEP)
    text = (tmp_path / "memory.html").read_text(encoding="utf-8")
    assert "workspace bytes: assumed" in text
    assert "100 B per request" in text
    for anchor in ("#by-context", "#by-depth", "#where-kv-ends-first"):
        assert f'<a href="{anchor}">' in text


def test_the_command_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "memory.html"
    done = CliRunner().invoke(app, ["profile", "memory", "llama2-a100-80gb", "--context", "1024", "--report", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text(encoding="utf-8")
    assert "derived, not measured" in text
    assert "the profile knows nothing beside weights and KV" in text
