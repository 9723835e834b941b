"""Exit batching and skipped KV in the live engine: token for token what each method promises, for both families."""
# ruff: noqa: F811 (fixtures of the engine's own tests)

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.errors import UnknownNameError  # noqa: E402
from heliosim.exits.pricing import Counts, Row, parts_of, segment_ends  # noqa: E402
from heliosim.registry import EXIT_BATCHING, SKIPPED_KV  # noqa: E402
from heliosim.types import ExitRule  # noqa: E402
from tests.contracts.test_torch_engine import (  # noqa: E402, F401
    Hand,
    engine,
    expected,
    folders,
    middle_threshold,
    one_thread,
    prompts,
    reference,
)

BATCHINGS, METHODS = sorted(EXIT_BATCHING.builtin), sorted(SKIPPED_KV.builtin)
ARCHITECTURES = ["opt", "llama"]


def served(engine: TorchEngine, name: str, rule: ExitRule, lengths: Any = (23, 9, 14, 30), tokens: int = 14) -> Hand:
    """All requests together, the last one joining late, so that steps of decode rows and mixed ones occur."""
    engine.reset()
    hand = Hand(engine, rule)
    hand.load(name, 6)
    asked = prompts(lengths)
    for i, prompt in enumerate(asked[:-1]):
        hand.submit(i, prompt, tokens)
    for _ in range(5):
        hand.step()
    hand.submit(len(asked) - 1, asked[-1], tokens)
    hand.outputs = hand.finish(chunk=11)  # type: ignore[attr-defined]
    return hand


def rule_of(engine: TorchEngine, name: str, batching: str, method: str, **more: Any) -> ExitRule:
    threshold = middle_threshold(engine.hosts[name], prompts((23, 9, 14, 30)), 2)
    return ExitRule("threshold", threshold, batching, method, **more)


@pytest.mark.parametrize(("name", "batching", "method"), list(product(ARCHITECTURES, BATCHINGS, METHODS)))
def test_every_pair_serves_and_leaves_nothing_behind(
    engine: TorchEngine, name: str, batching: str, method: str
) -> None:
    hand = served(engine, name, rule_of(engine, name, batching, method))
    assert {len(ids) for ids in hand.outputs.values()} == {14}  # type: ignore[attr-defined]
    decode = [o for o in hand.outcomes if len(o.tokens) > 1]
    assert {e for o in decode for e in o.tokens.exit_layers} > {6}, "the fixture never leaves early"
    assert engine.books()["kv_used_blocks"] == 0
    assert not engine.residency.gaps.done


@pytest.mark.parametrize(("name", "batching", "method"), list(product(ARCHITECTURES, BATCHINGS, METHODS)))
def test_without_exits_every_pair_is_the_full_model(
    engine: TorchEngine, reference: Callable[..., Any], name: str, batching: str, method: str
) -> None:
    hand = served(engine, name, ExitRule("threshold", 1.1, batching, method))
    for i, prompt in enumerate(prompts((23, 9, 14, 30))):
        assert hand.outputs[i] == expected(reference(name), prompt, 14)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("batching", ["wait-for-deepest", "rebatch"])
def test_recompute_equals_full_batching(engine: TorchEngine, name: str, batching: str) -> None:
    """``full`` computes the KV of every token in every layer at once; ``recompute`` the same KV later."""
    wanted = served(engine, name, rule_of(engine, name, "full", "propagate"), tokens=30)
    got = served(engine, name, rule_of(engine, name, batching, "recompute"), tokens=30)
    assert got.outputs == wanted.outputs  # type: ignore[attr-defined]
    assert got.exits == wanted.exits
    assert any(o.layers_run < 6 for o in got.outcomes), "nothing was ever skipped"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", ["recompute", "none", "copy", "propagate"])
def test_rebatch_makes_rows_independent(engine: TorchEngine, name: str, method: str) -> None:
    """A row that leaves at once runs what it would run alone: the batch does not show in its tokens."""
    together = served(engine, name, rule_of(engine, name, "rebatch", method))
    for i, prompt in enumerate(prompts((23, 9, 14))):
        engine.reset()
        alone = Hand(engine, rule_of(engine, name, "wait-for-deepest", method))
        alone.load(name, 6)
        alone.submit(0, prompt, 5)  # then a prompt joins the others, whose rows run every layer in that step
        assert alone.finish()[0] == together.outputs[i][:5]  # type: ignore[attr-defined]
        assert alone.exits[0] == together.exits[i][:5]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_methods_differ_in_what_is_said(engine: TorchEngine, name: str) -> None:
    rules = [rule_of(engine, name, "rebatch", method) for method in METHODS]
    said = [served(engine, name, rule, tokens=40).outputs for rule in rules]  # type: ignore[attr-defined]
    assert all(a != b for k, a in enumerate(said) for b in said[:k])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rebatch_that_never_breaks_even_is_wait_for_deepest(engine: TorchEngine, name: str) -> None:
    for method in METHODS:
        wanted = served(engine, name, rule_of(engine, name, "wait-for-deepest", method))
        got = served(engine, name, rule_of(engine, name, "rebatch", method, break_even=1e9))
        assert got.outputs == wanted.outputs  # type: ignore[attr-defined]
        assert [o.layers_run for o in got.outcomes] == [o.layers_run for o in wanted.outcomes]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eager_leaves_with_its_first_confident_row(engine: TorchEngine, name: str) -> None:
    eager = served(engine, name, rule_of(engine, name, "eager", "propagate"))
    threshold = eager.rule.threshold
    hasty = 0
    for outcome in eager.outcomes:
        exits, confidences = outcome.tokens.exit_layers, outcome.tokens.confidences
        if outcome.layers_run < 6:
            assert set(exits) == {outcome.layers_run}
            assert max(confidences) >= threshold
            hasty += sum(c < threshold for c in confidences)
    assert hasty, "nobody ever had to leave unsure"
    everybody = served(engine, name, rule_of(engine, name, "eager", "propagate", quorum=99))
    patient = served(engine, name, rule_of(engine, name, "wait-for-deepest", "propagate"))
    assert everybody.outputs == patient.outputs  # type: ignore[attr-defined]


def test_unknown_names_say_what_is_known(engine: TorchEngine) -> None:
    with pytest.raises(UnknownNameError, match="rebatch"):
        served(engine, "opt", ExitRule("threshold", 0.5, "rebach"))
    with pytest.raises(UnknownNameError, match="propagate"):
        served(engine, "opt", ExitRule("threshold", 0.5, "full", "propagat"))


@pytest.mark.parametrize(("name", "batching", "method"), list(product(ARCHITECTURES, BATCHINGS, METHODS)))
def test_the_price_counts_what_the_engine_ran(engine: TorchEngine, name: str, batching: str, method: str) -> None:
    """Tokens x layers and the deepest layer of every step, as the cost model sees them from its outcome."""
    rule = rule_of(engine, name, batching, method, break_even=3.0)
    engine.reset()
    hand = Hand(engine, rule)
    hand.load(name, 6)
    asked, dones, worked = prompts((23, 9, 14, 30)), {}, 0
    spec = engine.specs[name]
    for i, prompt in enumerate(asked[:3]):
        hand.submit(i, prompt, 14)
    steps = 0
    while hand.known:
        steps += 1
        if steps == 6:
            hand.submit(3, asked[3], 14)
        chosen = list(hand.known)
        starts = [hand.computed.get(r, 0) for r in chosen]
        rows = [Row(s, hand.known[r], dones.get(r)) for r, s in zip(chosen, starts, strict=True)]
        is_decoding = all(row.start and row.end == row.start + 1 for row in rows)
        outcome = hand.step()
        exits = outcome.tokens.exit_layers if is_decoding else None
        counts = Counts(len(rows), sum(row.end - row.start for row in rows), 0, 0, 0, 0)
        parts, done = parts_of(rule, segment_ends(spec, 6), rows, exits, counts)
        dones = dict(zip(chosen, done, strict=True)) if method == "recompute" else {}
        worked += sum(shape.layers * shape.tokens for shape in (parts.first, *parts.deeper))
        assert parts.layers_run == outcome.layers_run
        assert worked == engine.work, f"step {steps}"
