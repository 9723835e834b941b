"""Behaviour of the shipped tiny pair, measured: what a table holds, going on after an interruption, and swapping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from heliosim_calibrate import behaviour_stage
from heliosim_calibrate.behaviour import _parts
from heliosim_calibrate.behaviour_alone import measure_table
from heliosim_calibrate.behaviour_stage import BehaviourPlan, parts_folder
from heliosim_calibrate.plan import every_method
from heliosim_calibrate.prompts import Prompt

from heliosim.behaviour import REFERENCE
from heliosim.behaviour_quality import quality_table
from heliosim.behaviour_source import Opened, open_behaviour
from heliosim.behaviour_swap import replace_behaviour
from heliosim.errors import InputError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.formats.files import read_json, sha256_of, write_json
from heliosim.formats.profile import load_profile
from heliosim.synthetic.draw import behaviour_for
from heliosim.synthetic.spec import load_spec
from heliosim.synthetic.table import load_table
from heliosim.types import ExitRule, Placement
from tests.profiles import write_synthetic_profile

PLAN = BehaviourPlan(
    tasks=("qa", "chat"), prompts_per_task=3, closed_loop_prompts=2, tokens_per_text=10, rows=4, at_once=3
)
PAIR = ("tiny-opt-s", "tiny-opt-l")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("measured") / "table"
    measure_table(PLAN, PAIR, out, device="cpu", max_context=160)
    return out


@pytest.fixture(scope="module")
def opened(folder: Path) -> Opened:
    return open_behaviour(str(folder))


def test_what_a_measured_table_holds(opened: Opened) -> None:
    tokens, facts = opened.tokens, opened.facts
    assert opened.origin == "measured"
    assert [f"{m}:full" for m in PAIR] == [s for s in tokens.sources if s.endswith(":full")]
    assert tokens.sources[-1] == REFERENCE
    for source in tokens.sources[:-1]:
        part = tokens.of(sources=[source])
        assert (len(part.counts), set(part.counts.tolist())) == (4, {10}), source
    given = tokens.of(sources=[REFERENCE])
    assert (len(given.counts), given.size) == (6, facts.references.tokens)  # type: ignore[union-attr]
    assert (given.ends == given.counts).all(), "references end with the token that ends a text"
    assert all(tokens.has(what) for what in ("confidence", "margin", "entropy", "logprob", "top1", "agrees"))
    assert facts.tasks == {"qa": 2, "chat": 2}
    assert facts.rows == tokens.size


def test_facts_of_a_token_hang_together(opened: Opened) -> None:
    tokens = opened.tokens
    for model in PAIR:
        confidence, margin = tokens.fan("confidence", model), tokens.fan("margin", model)
        top, logprob = tokens.fan("top1", model), tokens.fan("logprob", model)
        assert ((margin <= confidence + 1e-6) & (margin >= -1e-6)).all()
        assert (tokens.fan("agrees", model) == (top == top[-1])).all()
        says = top == tokens.columns["token_id"]
        assert np.allclose(np.exp(logprob[says]), confidence[says], atol=1e-5)
        assert (logprob <= np.log(confidence) + 1e-5).all(), "no token is likelier than the top one"
        own = tokens.of(sources=[f"{model}:full"])
        assert (own.fan("top1", model)[-1] == own.columns["token_id"]).mean() == 1, "greedy text is the last layer's"


def test_quality_is_known_by_policy(opened: Opened) -> None:
    table = quality_table(opened.tokens, "tiny-opt-s", 0.8).set_index("policy")
    assert table.loc["full", "agreement"] == 1
    assert table.loc["full", "same_prefix"] == 1
    assert table.loc["greedy@2", "agreement"] < 1
    assert table["right"].notna().all(), "questions have one right answer"
    assert (table["perplexity"] >= 1).all()


def test_references_are_not_replayed_beside_texts_of_policies(folder: Path) -> None:
    _, behaviour = load_table(folder)
    assert REFERENCE not in behaviour.sources
    assert {task: len(names) for task, names in behaviour.sequences.items()} == {"qa": 2, "chat": 2}


def test_references_alone_stand_for_every_policy(tmp_path: Path) -> None:
    """No closed loop: the models only read; a simulation replays the texts that were given."""
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "Q: who", "completion": " is it then"}\n{"text": "some text to read"}\n'
    )
    plan = BehaviourPlan(prompts_file=tmp_path / "p.jsonl", closed_loop_prompts=0, tokens_per_text=4)
    measure_table(plan, PAIR[:1], tmp_path / "table", device="cpu", max_context=64)
    said, behaviour = load_table(tmp_path / "table")
    assert (said.facts.split, said.facts.sources, said.facts.references.file) == ("file", (), "p.jsonl")  # type: ignore[union-attr]
    text = behaviour.text("line-1", "tiny-opt-s:full")
    walk = behaviour.walk(text, Placement("tiny-opt-s", 6), ExitRule("threshold", 0.8))
    assert len(walk.exit_layers) == text.tokens > 2


def test_nothing_to_observe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a prompt\n")
    plan = BehaviourPlan(prompts_file=tmp_path / "p.txt", closed_loop_prompts=0, tokens_per_text=4)
    with pytest.raises(InputError, match="closed-loop-prompts"):
        measure_table(plan, PAIR[:1], tmp_path / "table", device="cpu", max_context=64)
    assert not (tmp_path / "table").exists()


def test_an_interrupted_measurement_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "table", []
    observe = behaviour_stage.observe

    def stopping(*args: object) -> object:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return observe(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(behaviour_stage, "observe", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_table(PLAN, PAIR, out, device="cpu", max_context=160)
    assert not out.exists()
    assert len(list(parts_folder(out).glob("part-*.parquet"))) == 4
    measure_table(PLAN, PAIR, out, device="cpu", max_context=160)
    assert not parts_folder(out).exists()
    jobs = 2 * 4 * 2 + 2  # two models of four policies, four prompts in parts of three; six references
    assert len(calls) == 5 + jobs - 4, "four parts were there already"
    assert sha256_of(out / "behaviour.parquet") == sha256_of(folder / "behaviour.parquet")


def test_parts_of_another_measurement_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "table"
    plan = BehaviourPlan(tasks=("qa",), prompts_per_task=2, closed_loop_prompts=1, tokens_per_text=4, at_once=1)

    def progress(what: str, share: float) -> None:
        if share > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_table(plan, PAIR[:1], out, device="cpu", max_context=96, progress=progress)
    assert any(parts_folder(out).iterdir())
    other = BehaviourPlan(tasks=("qa",), prompts_per_task=2, closed_loop_prompts=1, tokens_per_text=6, at_once=1)
    measure_table(other, PAIR[:1], out, device="cpu", max_context=96)
    assert set(open_behaviour(str(out)).tokens.of(sources=["tiny-opt-s:full"]).counts.tolist()) == {6}
    parts_folder(out).mkdir()
    (parts_folder(out) / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="in the way"):
        measure_table(other, PAIR[:1], out, device="cpu", max_context=96, overwrite=True)


def test_parts_are_bounded_by_prompts_and_by_tokens() -> None:
    prompts = [Prompt(str(k), "t", (1,)) for k in range(5)]
    assert [len(p) for p in _parts(prompts, 2, [1] * 5)] == [2, 2, 1]
    assert [len(p) for p in _parts(prompts, 9, [30_000, 2_000, 2_000, 90_000, 1])] == [2, 1, 1, 1]


def test_every_exit_method_is_a_policy() -> None:
    assert "full+propagate" in every_method()
    assert "eager+recompute" in every_method()
    assert sum(name.startswith("full+") for name in every_method()) == 1


@pytest.fixture
def swapped(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A profile that says it was measured on the tiny pair, and the table."""
    base = write_synthetic_profile(tmp_path / "base")
    raw = read_json(base.folder / "profile.json")
    said = read_json(folder / "behaviour.json")
    for name, like in zip(PAIR, ("small", "large"), strict=True):
        facts = raw["models"].pop(like)
        weights = inspect_checkpoint(checkpoint_path(name), "float32").weights_sha256()
        exits = said["exits"][name]
        heads = dict.fromkeys(map(str, exits), 0)
        raw["models"][name] = facts | {"exits": exits, "weights_sha256": weights, "exit_head_bytes": heads}
    raw["files"].pop("behaviour.parquet")
    raw["behaviour"] |= {"rows": 0}
    write_json(base.folder / "profile.json", raw)
    return base.folder, folder


def test_behaviour_is_replaced_and_times_stay(swapped: tuple[Path, Path], tmp_path: Path) -> None:
    base, table = swapped
    made = replace_behaviour(base, table, tmp_path / "new")
    old = load_profile(base)
    assert made.facts.models == old.facts.models
    assert made.facts.behaviour == load_table(table)[0].facts
    assert made.behaviour.sources == load_table(table)[1].sources
    assert made.facts.premises
    assert (tmp_path / "new" / "steps.parquet").read_bytes() == (base / "steps.parquet").read_bytes()


def test_behaviour_of_other_models_is_refused(swapped: tuple[Path, Path], tmp_path: Path) -> None:
    base, table = swapped
    raw = read_json(base / "profile.json")
    raw["models"]["tiny-opt-s"]["weights_sha256"] = "1" * 64
    write_json(base / "profile.json", raw)
    with pytest.raises(InputError, match="other weights"):
        replace_behaviour(base, table, tmp_path / "new")
    spec = load_spec("opt-pair")
    behaviour_for({"opt-1.3b": (6, 12, 24)}, spec, 0).save(tmp_path / "drawn")
    with pytest.raises(InputError, match="not measured"):
        replace_behaviour(base, tmp_path / "drawn", tmp_path / "new")
    assert not (tmp_path / "new").exists()
