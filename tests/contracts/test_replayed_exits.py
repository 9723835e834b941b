"""Exits on record in a live run: real layers of random weights, and the very exits a simulation of them has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from heliosim.errors import InputError  # noqa: E402
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint  # noqa: E402
from heliosim.formats.profile import NO_BEHAVIOUR, Profile, load_profile, write_profile  # noqa: E402
from heliosim.formats.results import load_run  # noqa: E402
from heliosim.replays import Replay, open_replay  # noqa: E402
from heliosim.runs import run_live, run_simulated, save  # noqa: E402
from heliosim.scenario import LiveSpec, Scenario  # noqa: E402
from tests import profiles  # noqa: E402

SIZES = {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2}
REST = {"vocab_size": 200, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile with exits on record, of models ``small`` and ``large``."""
    return profiles.write_synthetic_profile(tmp_path_factory.mktemp("recorded") / "profile")


@pytest.fixture(scope="module")
def served(recorded: Profile, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A profile of the same costs whose models are random weights without behaviour."""
    root = tmp_path_factory.mktemp("served")
    models = {}
    for name, facts in recorded.facts.models.items():
        (root / f"{name}.json").write_text(json.dumps({**SIZES, **REST, "num_hidden_layers": facts.layers}))
        listed = ",".join(map(str, facts.exits))
        info = inspect_checkpoint(checkpoint_path(f"random:{root}/{name}.json@exits={listed}"), "float32")
        spec = info.spec
        models[name] = facts.model_copy(
            update={
                "checkpoint": str(info.folder), "weights_sha256": info.weights_sha256(), "weights": "random",
                "weights_seed": 0, "layer_bytes": spec.layer_bytes, "base_bytes": spec.base_bytes,
                "exit_head_bytes": dict(spec.exit_head_bytes), "hidden_bytes": spec.hidden_bytes,
                "kv_bytes_per_token_layer": spec.kv_bytes_per_token_layer, "max_context": spec.max_context,
                "vocabulary": spec.vocabulary, "exit_kind": spec.kind,
            }
        )  # fmt: skip
    folder = root / "profile"
    folder.mkdir()
    changes = {"models": models, "behaviour": NO_BEHAVIOUR, "files": {}, "premises": []}
    write_profile(folder, recorded.facts.model_copy(update=changes))
    return load_profile(folder)


def scenario(profile: Profile, controller: Mapping[str, Any], **rest: Any) -> Scenario:
    """Requests that are all there at the start, so that nothing hangs on how long a step takes."""
    work = profiles.workload(requests=24) | {"arrivals": {"kind": "constant", "rate_per_s": 1e6}}
    changes: dict[str, Any] = {"workload": work, "memory": {"budget_bytes": 900_000}, "controller": dict(controller)}
    return profiles.scenario(profile, **changes | rest)


def exits_of(results: Any) -> dict[tuple[int, int], tuple[Any, ...]]:
    columns = ("request_id", "position", "model", "depth", "exit_layer", "confidence", "logprob", "agrees")
    rows = zip(*(results.tokens[c].to_pylist() for c in columns), strict=True)
    return {(r, p): tuple(rest) for r, p, *rest in rows}


CONTROLLERS: dict[str, dict[str, Any]] = {
    "vanilla": {"kind": "vanilla", "model": "large"},
    "early-exit": {"kind": "early-exit", "model": "large", "threshold": 0.7},
    "rebatch": {"kind": "early-exit", "model": "large", "batching": "rebatch", "threshold": 0.7},
    "eager": {"kind": "early-exit", "model": "large", "batching": "eager", "threshold": 0.7},
    "recompute": {"kind": "early-exit", "model": "large", "batching": "rebatch", "skipped_kv": "recompute"},
    "fixed": {"kind": "fixed", "model": "small", "depth": 2},
    "helios": {"kind": "helios", "use_evaluation": False, "window_tokens": 20, "max_breaches": 4},
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_live_run_has_the_exits_breaches_and_lengths_of_the_simulated_one(
    served: Profile, recorded: Profile, name: str
) -> None:
    replay = open_replay(str(recorded.folder))
    asked = scenario(served, CONTROLLERS[name])
    live = run_live(asked, served, replay=replay)
    simulated = run_simulated(asked, served, replay=replay)
    ours, theirs = exits_of(live.results), exits_of(simulated)
    assert ours == theirs
    assert len(ours) > 100
    threshold = simulated.threshold
    breaches = [sum(t[3] < threshold and t[2] == t[1] for t in found.values()) for found in (ours, theirs)]
    assert breaches[0] == breaches[1] > 0
    if name != "fixed" and name != "vanilla":
        assert len({t[2] for t in ours.values()}) > 1, "no token exits early"
    if name == "helios":
        kinds = [
            [e for e in r.events["kind"].to_pylist() if e in ("load", "switch", "breach")]
            for r in (live.results, simulated)
        ]
        assert kinds[0] == kinds[1]
        assert len({t[:2] for t in ours.values()}) > 1, "the placement never changed"
    lengths = {
        r: n for r, n in zip(*(simulated.requests[c].to_pylist() for c in ("request_id", "output_tokens")), strict=True)
    }
    assert {r: len(ids) for r, ids in live.outputs.items()} == lengths


@pytest.mark.parametrize("name", CONTROLLERS)
def test_strides_on_the_device_have_them_too(served: Profile, recorded: Profile, name: str) -> None:
    """The fast engine, sixteen steps at a time: what the device finds of exits and breaches gives way to the record."""
    replay = open_replay(str(recorded.folder))
    asked = scenario(served, CONTROLLERS[name])
    simulated = run_simulated(asked, served, replay=replay)
    asked = asked.model_copy(update={"live": LiveSpec(engine="fast", max_stride=16)})
    live = run_live(asked, served, replay=replay)
    assert exits_of(live.results) == exits_of(simulated)
    assert live.results.events["kind"].to_pylist() == simulated.events["kind"].to_pylist()
    if name in ("vanilla", "fixed", "helios"):
        assert any(outcome.stride is not None for _, outcome in live.log), "nothing was done in strides"


def test_texts_end_where_the_record_ends(served: Profile, recorded: Profile) -> None:
    """Natural lengths: the workload asks for none, so the recorded texts say when to stop."""
    work = profiles.workload(requests=16, max_tokens=24) | {"arrivals": {"kind": "constant", "rate_per_s": 1e6}}
    work["lengths"] = "natural"
    for task in work["tasks"]:
        del task["output_tokens"]
    asked = scenario(served, CONTROLLERS["early-exit"], workload=work)
    replay = open_replay(str(recorded.folder))
    live, simulated = run_live(asked, served, replay=replay), run_simulated(asked, served, replay=replay)
    assert exits_of(live.results) == exits_of(simulated)
    ends = {len(ids) for ids in live.outputs.values()}
    assert len(ends) > 1
    assert min(ends) < 24


def test_a_replayed_run_says_so_everywhere(
    served: Profile, recorded: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from heliosim.charts import caption_of, run_caption
    from heliosim.console import print_comparison, print_summary
    from heliosim.metrics import SystemResult

    replay = open_replay(str(recorded.folder))
    asked = scenario(served, CONTROLLERS["early-exit"])
    live, simulated = run_live(asked, served, replay=replay), run_simulated(asked, served, replay=replay)
    save(live, tmp_path / "live")
    save(simulated, tmp_path / "simulated")
    loaded = load_run(tmp_path / "live")
    assert loaded.info.replayed_exits == replay.label
    assert "profile (measured exits" in replay.label
    assert "exits replayed" in run_caption(loaded)
    assert "exits replayed" in caption_of([SystemResult("x", simulated, [loaded], clock="cpu")])
    print_summary(loaded, None)
    assert "Exits replayed from profile" in capsys.readouterr().out
    evaluated = scenario(served, {"kind": "helios", "probe_requests": 2})
    print_summary(run_simulated(evaluated, served, replay=replay), None)
    assert "simulated, exits replayed" in capsys.readouterr().out
    print_comparison([tmp_path / "live", tmp_path / "simulated"], tmp_path / "report.html")
    assert "Exits replayed from profile" in capsys.readouterr().out
    assert "Exits replayed from profile" in (tmp_path / "report.html").read_text()
    own = run_simulated(scenario(recorded, CONTROLLERS["early-exit"]), recorded)
    assert own.info.replayed_exits == ""
    assert "replayed" not in run_caption(own)


def test_a_behaviour_that_does_not_fit_is_refused(served: Profile, recorded: Profile) -> None:
    replay = open_replay(str(recorded.folder))
    asked = scenario(served, CONTROLLERS["early-exit"])
    texts, sequences = replay.behaviour.texts, replay.behaviour.sequences
    from heliosim.behaviour import Behaviour

    without = Replay(Behaviour(texts, sequences, {"small": (1, 2, 3)}), replay.facts, "other")
    for run in (run_live, run_simulated):
        with pytest.raises(InputError, match=r"exits at \[1, 2, 3\] there"):
            run(asked, served, replay=without)
    with pytest.raises(InputError, match="knows no exits"):
        open_replay(str(served.folder))
    with pytest.raises(InputError, match="--replay-exits"):
        run_live(scenario(served, {"kind": "helios"}), served)


def test_random_weights_serve_without_a_replay_too(served: Profile) -> None:
    live = run_live(scenario(served, CONTROLLERS["vanilla"]), served)
    assert live.results.counts["finished"] == 24
    assert set(live.results.tokens["agrees"].to_pylist()) == {None}
    again = run_live(scenario(served, CONTROLLERS["vanilla"]), served)
    assert again.outputs == live.outputs


def test_examples_over_random_weights_run(served: Profile, recorded: Profile, tmp_path: Path) -> None:
    from heliosim.examples import write_examples
    from heliosim.scenario import load_scenario

    written = {p.stem: load_scenario(p) for p in write_examples(tmp_path / "example", served.folder)}
    counts = run_simulated(written["vanilla-small"]).counts
    assert counts["finished"] > 40, "few are longer than these models' context"
    replay = open_replay(str(recorded.folder))
    assert run_simulated(written["helios"], replay=replay).counts["finished"] == counts["finished"]
