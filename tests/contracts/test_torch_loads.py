"""The torch engine's loads beside steps, layer by layer, and from disk: the texts are those of plain loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.types import Arriving, Load, Placement, Run  # noqa: E402
from tests.contracts.test_torch_engine import (  # noqa: E402
    Hand,
    engine,
    folders,
    one_thread,
    prompts,
)

__all__ = ["engine", "folders", "one_thread"]  # fixtures


def plain(engine: TorchEngine, model: str, depth: int, prompt: list[int], length: int) -> list[int]:
    """The text behind a plain load; the engine is empty afterwards."""
    hand = Hand(engine)
    hand.load(model, depth, 40)
    hand.submit(99, prompt, length)
    text = hand.finish()[99]
    engine.reset()
    return text


class Parts(Hand):
    """Loads in parts."""

    def part(self, part: Any, model: str, depth: int, blocks: int, *, stores: bool = False, keep: bool = False) -> Any:
        kept = tuple(self.computed.items()) if keep else ()
        if part == "finish" and not keep:
            self.evict(*self.computed)
        evicted, self.evicted = tuple(self.evicted), []
        load = Load(Placement(model, depth), blocks, "test", stores, kept, evicted, part)
        return self.engine.perform(load)


@pytest.mark.parametrize(("model", "depth"), [("opt", 6), ("llama-b", 4)])
def test_steps_go_on_while_weights_come(engine: TorchEngine, model: str, depth: int) -> None:
    """Beside a deepening and beside another model: what is resident answers as before, then the new placement does."""
    before, after = prompts([9, 12])
    texts = plain(engine, "opt", 2, before, 12), plain(engine, model, depth, after, 12)
    hand = Parts(engine)
    hand.load("opt", 2, 40)
    hand.submit(0, before, 12)
    hand.step()
    begun = hand.part("begin", model, depth, 20)
    assert engine.books()["kv_blocks"] == 20
    assert str(engine.placement) == "opt@2"
    assert hand.finish()[0] == texts[0]
    done = hand.part("finish", model, depth, 30)
    assert done.arrives_s is not None
    assert done.arrives_s <= 0
    assert begun.tokens == done.tokens
    assert engine.books()["weights_bytes"] == engine.specs[model].weights_bytes(depth)
    hand.submit(1, after, 12)
    assert hand.finish()[1] == texts[1]


def test_a_run_says_when_the_weights_are_there(engine: TorchEngine) -> None:
    hand = Parts(engine)
    hand.load("opt", 2, 40)
    hand.submit(0, prompts([9])[0], 40)
    assert hand.step().arrives_s is None
    hand.part("begin", "opt", 6, 20)
    assert engine.residency.fetch is not None
    engine.residency.fetch.wait()
    told = hand.step()
    assert told.arrives_s is not None
    assert told.arrives_s <= 0


def test_extending_with_fetched_layers_is_extending(engine: TorchEngine) -> None:
    texts = []
    for part in (False, True):
        engine.reset()
        hand = Parts(engine)
        hand.load("opt", 2, 40, stores=True)
        hand.submit(0, prompts([9])[0], 20)
        for _ in range(6):
            hand.step()
        if part:
            hand.part("begin", "opt", 6, 20, stores=True)
            hand.part("finish", "opt", 6, 30, keep=True)
        else:
            hand.load("opt", 6, 30, keep=True)
        texts.append(hand.finish()[0])
    assert texts[0] == texts[1]


def test_a_transfer_given_up_leaves_nothing_behind(engine: TorchEngine) -> None:
    text = plain(engine, "opt", 2, prompts([9])[0], 12)
    hand = Parts(engine)
    hand.load("opt", 2, 40)
    hand.submit(0, prompts([9])[0], 12)
    hand.step()
    hand.part("begin", "llama", 4, 10)
    hand.part("drop", "opt", 2, 40)
    assert engine.residency.fetch is None
    assert engine.books()["kv_blocks"] == 40
    assert hand.finish()[0] == text


@pytest.mark.parametrize(("present", "model", "depth"), [(0, "opt", 6), (2, "opt", 6), (2, "llama", 4)])
def test_a_first_step_on_arriving_layers(engine: TorchEngine, present: int, model: str, depth: int) -> None:
    text = plain(engine, model, depth, prompts([9])[0], 12)
    hand = Hand(engine)
    if present:
        hand.load("opt", present, 40)
    engine.perform(replace(Load(Placement(model, depth), 40, "test"), is_pipelined=True))
    hand.submit(0, prompts([9])[0], 12)
    perform = engine.perform

    def arriving(action: Any) -> Any:
        return perform(replace(action, arriving=Arriving(present, None)) if isinstance(action, Run) else action)

    engine.perform = arriving  # type: ignore[method-assign]
    assert hand.step().stalled_s >= 0
    engine.perform = perform  # type: ignore[method-assign]
    assert hand.finish()[0] == text
    assert engine.books()["weights_bytes"] == engine.specs[model].weights_bytes(depth)


def test_what_host_memory_may_not_hold_is_read_from_disk(engine: TorchEngine) -> None:
    texts = [plain(engine, model, depth, prompts([9])[0], 12) for model, depth in (("opt", 6), ("llama", 4))]
    hand, spec = Hand(engine), engine.specs["opt"]
    load = Load(Placement("opt", 6), 40, "test", disk_bytes=spec.weights_bytes(6), host=(("opt", 6),))
    engine.perform(load)
    assert engine.hosts["opt"].host_bytes == spec.weights_bytes(6)
    assert engine.hosts["llama"].host_bytes == 0
    hand.submit(0, prompts([9])[0], 12)
    assert hand.finish()[0] == texts[0]
    other = engine.specs["llama"]
    engine.perform(Load(Placement("llama", 4), 40, "test", disk_bytes=other.weights_bytes(4), host=()))
    assert sum(host.host_bytes for host in engine.hosts.values()) == 0
    hand.submit(1, prompts([9])[0], 12)
    assert hand.finish()[1] == texts[1]
