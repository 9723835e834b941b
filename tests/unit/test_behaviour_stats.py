"""Statistics of behaviour tables on hand-made tokens with known answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from heliosim.behaviour_order import (
    _windows_of,
    breach_table,
    correlation_table,
    request_share,
    run_table,
    runs,
    windows,
)
from heliosim.behaviour_quality import length_table, quality_table
from heliosim.behaviour_stats import (
    complement_table,
    confidence_table,
    depth_table,
    joint_table,
    reliability_table,
    threshold_curve,
    threshold_table,
)
from heliosim.behaviour_tokens import Tokens, exit_index, exit_layers, tokens_of
from heliosim.bootstrap import estimates
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.profile import Profile
from heliosim.formats.tokens import read_tokens
from heliosim.profile_view import open_profile
from heliosim.streams import stream
from tests.profiles import write_synthetic_profile
from tests.tokens import leaving, tokens_table


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return write_synthetic_profile(tmp_path / "profile")


def drawn(count: int = 40, length: int = 30) -> Tokens:
    """Confidences of no structure at three exits."""
    rng = stream(1, "drawn")
    columns = {f"confidence:m@{e}": rng.random(count * length).astype(np.float32) for e in (2, 4, 6)}
    columns |= {f"agrees:m@{e}": rng.random(count * length) < 0.5 for e in (2, 4)}
    columns["agrees:m@6"] = np.ones(count * length, bool)
    return tokens_table([[0] * length] * count, columns)


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    x = stream(0, "x").normal(size=400)
    found = estimates(x[:, None], lambda s: s / 400, seed=3, name="a", draws=2000)
    half = 1.96 * x.std() / math.sqrt(400)
    assert found.value[0] == pytest.approx(x.mean())
    assert found.high[0] - found.low[0] == pytest.approx(2 * half, rel=0.1)
    again = estimates(x[:, None], lambda s: s / 400, seed=3, name="a", draws=2000)
    other = estimates(x[:, None], lambda s: s / 400, seed=3, name="b", draws=2000)
    assert found.low[0] == again.low[0] != other.low[0]


def test_it_is_requests_that_are_drawn_again() -> None:
    """A hundred equal tokens of a request say no more than one; its texts under two policies go together."""
    short = leaving([[i % 2 * 2] for i in range(30)])
    long = leaving([[i % 2 * 2] * 100 for i in range(30)])
    a, b = (threshold_table(t, "m", (0.5,)).iloc[0] for t in (short, long))
    assert (a["low"], a["high"]) == (b["low"], b["high"])
    assert 0 < a["low"] < a["share"] == 0.5 < a["high"] < 1
    twice = leaving([[0]] * 6, names=["a", "b", "c"] * 2, sources=["m:full"] * 3 + ["m:threshold"] * 3)
    assert (twice.requests, len(twice.counts)) == (3, 6)


def test_one_request_has_no_interval() -> None:
    row = threshold_table(leaving([[0, 1, 2]]), "m", (0.5,)).iloc[0]
    assert row["share"] == pytest.approx(1 / 3)
    assert math.isnan(row["low"])


# --- exits ------------------------------------------------------------------------------------------------------------


def test_where_tokens_leave() -> None:
    tokens = leaving([[0, 1, 2, 3], [0, 0]])
    assert exit_layers(tokens, "m", 0.5).tolist() == [2, 4, 6, 6, 2, 2]
    assert exit_layers(tokens, "m", 0.5, depth=4).tolist() == [2, 4, 4, 4, 2, 2]
    table = threshold_table(tokens, "m", (0.5, 0.95))
    assert table["share"].tolist() == pytest.approx([3 / 6, 1 / 6, 2 / 6, 0, 0, 1])
    assert table["tokens"].tolist() == [6] * 6


def test_the_curve_says_at_every_threshold_what_the_table_says() -> None:
    tokens = drawn()
    curve = threshold_curve(tokens, "m", points=21)
    for row in curve.to_dict("records"):
        at = np.float32(row["threshold"])
        left = exit_index(tokens, "m", float(at))
        for i, e in enumerate((2, 4, 6)):
            assert row[f"exit {e}"] == pytest.approx(float((left == i).mean())), (row["threshold"], e)
        agrees = tokens.fan("agrees", "m")[left, np.arange(tokens.size)]
        assert row["agreement"] == pytest.approx(agrees.mean())
        assert row["mean_depth"] == pytest.approx(exit_layers(tokens, "m", float(at)).mean())
        assert row["breaches"] == pytest.approx((tokens.fan("confidence", "m") < at).all(axis=0).mean())
    partial = threshold_curve(tokens, "m", depth=4, points=3)
    assert partial["exit 4"].iloc[-1] == 1
    assert "exit 6" not in partial


def test_by_depth() -> None:
    columns = dict(leaving([[0, 1], [2, 3]]).columns)
    columns |= {f"logprob:m@{e}": np.log([p, p, 1, 1]) for e, p in ((2, 0.25), (4, 0.5), (6, 1.0))}
    table = depth_table(tokens_table([[0, 0], [0, 0]], columns), "m")
    assert table["agreement"].tolist() == [0.25, 0.5, 1]
    assert table["perplexity"].tolist() == pytest.approx([2, math.sqrt(2), 1])
    assert (table["perplexity_low"] <= table["perplexity"]).all()
    assert table["confidence"].tolist() == pytest.approx([0.3, 0.5, 0.7])
    assert "margin" not in table
    assert "perplexity" not in depth_table(leaving([[0], [1]]), "m")


# --- reliability ------------------------------------------------------------------------------------------------------


def test_calibration_error_of_two_bins() -> None:
    """Eight tokens of 0.95, six of them right; two of 0.15, one right: |0.95 - 0.75| 0.8 + |0.15 - 0.5| 0.2 = 0.23."""
    confidence = [0.95] * 8 + [0.15] * 2
    agrees = [True] * 6 + [False] * 2 + [True, False]
    both = {f"confidence:m@{e}": np.array(confidence) for e in (2, 4, 6)}
    both |= {f"agrees:m@{e}": np.array(agrees) for e in (2, 4, 6)}
    tokens = tokens_table([[0] * 5] * 2, both)
    row = reliability_table(tokens, "m").iloc[0]
    assert row["ece"] == pytest.approx(0.23)
    assert row["gap"] == pytest.approx(0.79 - 0.7)
    assert row["ece_low"] <= row["ece"] <= row["ece_high"]
    curve = confidence_table(tokens, "m")
    mine = curve[curve["exit_layer"] == 2]
    assert mine[["bin_low", "right", "tokens"]].to_numpy().tolist() == [[0.1, 0.5, 2], [0.9, 0.75, 8]]


def test_a_sure_token_at_1_is_in_the_last_bin() -> None:
    columns = {f"{what}:m@{e}": np.ones(2) for what in ("confidence", "agrees") for e in (2, 4, 6)}
    assert confidence_table(tokens_table([[0, 0]], columns), "m")["bin_low"].tolist() == [0.9] * 3
    assert reliability_table(tokens_table([[0, 0]], columns), "m")["ece"].tolist() == [0] * 3


def test_being_right_about_the_text_needs_ids() -> None:
    columns = dict(leaving([[0, 0, 0, 0]]).columns)
    with pytest.raises(InputError, match="no token ids"):
        reliability_table(tokens_table([[0] * 4], columns), "m", "target")
    columns |= {"token_id": np.array([7, 8, 9, 9])}
    columns |= {f"top1:m@{e}": np.array([7, 8, 0, 0]) for e in (2, 4, 6)}
    assert reliability_table(tokens_table([[0] * 4], columns), "m", "target")["right"].tolist() == [0.5] * 3


# --- two models -------------------------------------------------------------------------------------------------------


def test_joint_of_two_models() -> None:
    exits = {"a": (1, 2), "b": (3, 6)}
    columns = {
        "confidence:a@1": [0.9, 0.9, 0.1, 0.1],
        "confidence:a@2": [0.9] * 4,
        "confidence:b@3": [0.9, 0.1, 0.9, 0.1],
        "confidence:b@6": [0.9] * 4,
    } | {f"agrees:{k}": [True] * 4 for k in ("a@1", "a@2", "b@3", "b@6")}
    tokens = tokens_table([[0, 0], [0, 0]], columns, exits=exits)
    table = joint_table(tokens, "a", "b", 0.5)
    assert table[["a", "b"]].to_numpy().tolist() == [[1, 3], [1, 6], [2, 3], [2, 6]]
    assert table["share"].tolist() == [0.25] * 4
    assert table["given_one"].tolist() == [0.5] * 4
    found = complement_table(tokens, "a", "b", 0.5).set_index("measure")["value"]
    assert found["helped"] == 0.5
    assert found["helped anyway"] == 0.5
    assert found["depth correlation"] == pytest.approx(0)
    assert "same last word" not in found
    same = tokens_table([[0, 0], [0, 0]], columns | {"confidence:b@3": [0.9, 0.9, 0.1, 0.1]}, exits=exits)
    assert complement_table(same, "a", "b", 0.5).set_index("measure")["value"]["depth correlation"] == pytest.approx(1)


# --- order ------------------------------------------------------------------------------------------------------------


def test_alternating_exits_are_anticorrelated() -> None:
    tokens = leaving([[0, 2] * 50] * 4)
    table = correlation_table(tokens, "m", 0.5, lags=3).set_index("lag")
    assert table["value"].tolist() == pytest.approx([-1, 1, -1])
    assert table.loc[2, "pairs"] == 4 * 98
    assert request_share(tokens, "m", 0.5) == 0


def test_easy_and_hard_texts_are_correlation_between_texts_only() -> None:
    tokens = leaving([[0] * 20, [2] * 20] * 5)
    table = correlation_table(tokens, "m", 0.5, lags=2)
    assert table["value"].tolist() == pytest.approx([1, 1])
    assert table["within"].isna().all()
    assert request_share(tokens, "m", 0.5) == pytest.approx(1)


def test_no_correlation_across_texts_and_none_of_a_constant() -> None:
    table = correlation_table(leaving([[0], [2], [0]]), "m", 0.5)
    assert table.empty
    assert correlation_table(leaving([[1, 1, 1]] * 3), "m", 0.5, lags=1)["value"].isna().all()


def test_runs_end_with_their_text() -> None:
    tokens = leaving([[0, 0, 2], [2, 2, 0], [0]])
    state, length, text = runs(tokens, exit_index(tokens, "m", 0.5))
    assert list(zip(state, length, text, strict=True)) == [(0, 2, 0), (2, 1, 0), (2, 2, 1), (0, 1, 1), (0, 1, 2)]
    table = run_table(tokens, "m", 0.5).set_index("exit_layer")
    assert table["runs"].tolist() == [3, 0, 2]
    assert table.loc[2, "mean"] == pytest.approx(4 / 3)
    assert table.loc[6, "longest"] == 2
    assert math.isnan(table.loc[4, "mean"])


def test_mean_run_of_independent_tokens_is_what_it_says() -> None:
    at = stream(5, "runs").integers(0, 2, size=(300, 40)) * 2
    table = run_table(leaving(at.tolist()), "m", 0.5).set_index("exit_layer")
    assert table.loc[2, "mean"] == pytest.approx(table.loc[2, "independent"], rel=0.03)


def test_breaches_in_windows() -> None:
    """Per 10 tokens: task a breaches 4 then 6 at layer 2; of task b no window is full."""
    a = [[2] * 4 + [0] * 6, [2] * 6 + [0] * 4]
    tokens = leaving([*a, [2] * 7], tasks=["a", "a", "b"])
    breaches = tokens.fan("confidence", "m", 2)[0] < 0.5
    assert windows(tokens, breaches, 10).tolist() == [4, 6]
    table = breach_table(tokens, "m", 0.5, window=10, limit=5).set_index("depth")
    assert table.loc[2, ["windows", "std", "least", "most", "over_limit"]].tolist() == [2, 1, 4, 6, 0.5]
    assert table.loc[2, "mean"] == pytest.approx(10 * 17 / 27)
    assert table.loc[6, "mean"] == 0


def test_windows_over_texts_laid_in_a_row() -> None:
    """Texts in their own order give the windows of ``windows``; a resampled order counts what stands in each."""
    rng = stream(2, "windows")
    counts = rng.integers(1, 12, 50)
    breaches = rng.random(int(counts.sum())) < 0.4
    starts = np.concatenate(([0], np.cumsum(counts)))[:-1]
    sums = np.concatenate(([0], np.cumsum(breaches)))
    parts = np.split(breaches, starts[1:])
    for order in (np.arange(50), rng.integers(0, 50, 50)):
        row = np.concatenate([parts[k] for k in order])
        whole = len(row) // 7
        expected = row[: whole * 7].reshape(whole, 7).sum(axis=1)
        assert _windows_of(sums, starts[order], counts[order], 7).tolist() == expected.tolist()


# --- closed loop ------------------------------------------------------------------------------------------------------


def closed() -> Tokens:
    """Two prompts; the full model says 1 2 3 (end) and 4 4; greedy@2 says 1 9 (end) and 4 4, and is half right."""
    ids = [1, 2, 3, 0, 4, 4, 1, 9, 0, 0, 4, 4]
    last = [1, 2, 3, 0, 4, 4, 1, 2, 0, 0, 4, 4]
    columns = {f"confidence:m@{e}": np.full(12, 0.9) for e in (2, 4, 6)}
    columns |= {f"agrees:m@{e}": np.ones(12, bool) for e in (2, 4, 6)}
    columns |= {f"top1:m@{e}": np.array(last) for e in (2, 4, 6)}
    columns |= {f"logprob:m@{e}": np.log(np.full(12, 0.5)) for e in (2, 4, 6)}
    columns["token_id"] = np.array(ids)
    texts = [[0] * 4, [0] * 2, [0] * 4, [0] * 2]
    sources = ["m:full"] * 2 + ["m:greedy@2"] * 2
    names, right = ["p", "q"] * 2, [1, math.nan, 0.5, math.nan]
    return tokens_table(texts, columns, names=names, sources=sources, ends=[3, 0, 2, 0], right=right)


def test_quality_of_what_policies_wrote() -> None:
    table = quality_table(closed(), "m", 0.5).set_index("policy")
    full, greedy = table.loc["full"], table.loc["greedy@2"]
    assert (full["texts"], full["tokens"], greedy["tokens"]) == (2, 5, 4)
    assert (full["agreement"], greedy["agreement"]) == (1, 0.75)
    assert [full["perplexity"], greedy["perplexity"]] == pytest.approx([2, 2])
    assert (full["same_prefix"], greedy["same_prefix"]) == (1, pytest.approx((1 / 3 + 1) / 2))
    assert (full["right"], greedy["right"]) == (1, 0.5)
    assert (full["ended"], full["length"], greedy["length"]) == (0.5, 2.5, 2)
    assert greedy["length_change"] == -0.5
    assert (full["layers"], greedy["layers"]) == (6, 2)


def test_what_a_table_does_not_know_of_quality_is_nan() -> None:
    table = quality_table(leaving([[0, 1]] * 2, sources=["m:full", "m:threshold"]), "m", 0.5)
    assert table["perplexity"].isna().all()
    assert table["agreement"].isna().all()
    assert table["layers"].tolist() == [6, 3]


def test_lengths() -> None:
    table = length_table(closed()).set_index("source")
    assert table.loc["m:full", ["texts", "ended", "output_mean", "cut_at"]].tolist() == [2, 0.5, 2.5, 4]
    assert table.loc["m:greedy@2", "prompt_mean"] == 5


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_profile_is_read_whole_and_as_a_simulation_sees_it(profile: Profile) -> None:
    exits = {n: m.exits for n, m in profile.facts.models.items()}
    tokens = read_tokens(profile.folder / "behaviour.parquet", exits)
    replayed = tokens_of(profile.behaviour)
    assert tokens.size == replayed.size == profile.facts.behaviour.rows
    for model in exits:
        assert exit_layers(tokens, model, 0.8).tolist() == exit_layers(replayed, model, 0.8).tolist()
        shares = profile.behaviour.exit_shares(model, f"{model}:full", 0.8)
        table = threshold_table(tokens.of(sources=[f"{model}:full"]), model, (0.8,))
        assert table["share"].tolist() == pytest.approx(list(shares.values()))
    assert tokens.source_of("small") == "small:full"
    assert tokens.has("margin")
    assert not tokens.has("top1")
    part = tokens.of(sources=["small:full"], task="qa")
    assert part.tasks == ["qa"]
    assert part.size == 3 * 20
    assert part.ends.tolist() == [0, 16, 17]


def test_tables_that_were_drawn_know_less() -> None:
    derived = open_profile("llama2-h100-80gb")
    exits = {n: m.exits for n, m in derived.facts.models.items()}
    tokens = read_tokens(derived.folder / "behaviour.parquet", exits)
    model = next(iter(exits))
    assert tokens.source_of(model) == f"{model}:full"
    assert not tokens.has("logprob")


def test_unknown_names_are_named(profile: Profile) -> None:
    tokens = leaving([[0]])
    with pytest.raises(UnknownNameError, match="model: unknown name"):
        tokens.fan("confidence", "n")
    with pytest.raises(UnknownNameError, match="behaviour source: unknown name"):
        tokens.of(sources=["m:ful"])
    with pytest.raises(UnknownNameError, match="task: unknown name"):
        tokens.of(task="u")
    with pytest.raises(InputError, match="no exit there"):
        tokens.fan("confidence", "m", 3)
    with pytest.raises(InputError, match="does not have it"):
        tokens.fan("entropy", "m")
    with pytest.raises(InputError, match="missing column"):
        read_tokens(profile.folder / "behaviour.parquet", {"small": (2, 5)})
    with pytest.raises(InputError, match="not a readable table"):
        read_tokens(profile.folder / "profile.json", {"small": (2,)})
