"""Loads and steps that fail: the engine can be asked again, the server goes on, and texts are those of a good run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heliosim.drive import Finished  # noqa: E402
from heliosim.engines.models.arena import Arena, allocate  # noqa: E402
from heliosim.engines.models.host import HostModel  # noqa: E402
from heliosim.engines.replay import ReplayEngine  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.errors import DeviceMemoryError, LoadError, MemoryBudgetError  # noqa: E402
from heliosim.recorder import TableRecorder  # noqa: E402
from heliosim.serving.batcher import ContinuousBatcher  # noqa: E402
from heliosim.serving.loading import Loading  # noqa: E402
from heliosim.serving.memory import MemoryPool  # noqa: E402
from heliosim.serving.server import Server  # noqa: E402
from heliosim.simulate import simulate_server  # noqa: E402
from heliosim.types import Load, Placement, Run  # noqa: E402
from heliosim.workload import OpenLoop  # noqa: E402
from tests.contracts.test_residency import BUDGET, WAYS, Live, Scripted, arrivals, check_books, serve  # noqa: E402
from tests.contracts.test_torch_engine import Hand, engine, folders, one_thread, prompts  # noqa: E402

__all__ = ["engine", "folders", "one_thread"]  # fixtures
ASKED = arrivals([9, 30, 17, 4, 21, 12])
DEEPER = [("llama", 2), ("llama", 6)]
OTHER = [("llama", 2), ("opt", 6)]


class Faulty:
    """``HostModel.stream`` that raises ``error`` where it is asked for a piece the ``at``-th time, and then no more."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, *, for_ever: bool = False
    ) -> None:
        self.left, self.error, self.for_ever, self.raised = at, error, for_ever, 0
        plain = HostModel.stream

        def stream(host: HostModel, piece: Any, ring: Any) -> Any:
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.for_ever):
                self.raised += 1
                raise self.error
            return plain(host, piece, ring)

        monkeypatch.setattr(HostModel, "stream", stream)


def same_again(live: Live, engine: TorchEngine, controller: Any, loading: Loading, rows: int = 4) -> None:
    """The log, failures included, drives a simulated server through the same run."""
    recorder = TableRecorder()
    server = Server(
        controller, ContinuousBatcher(rows, 40), MemoryPool(BUDGET), engine.specs, recorder, loading=loading
    )
    replay = ReplayEngine(live.done.log)
    finished: Finished = simulate_server(server, replay, OpenLoop(ASKED))
    assert replay.position == len(live.done.log)
    assert finished.end_s == live.done.end_s
    assert recorder.tables().requests.equals(live.recorder.tables().requests)
    assert recorder.tables().steps.equals(live.recorder.tables().steps)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("script", "in_flight"), [(DEEPER, "extend"), (DEEPER, "reprefill"), (OTHER, "boundary")])
@pytest.mark.parametrize("at", [1, 5])
def test_a_run_goes_on_behind_a_copy_that_failed(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, way: str, script: Any, in_flight: Any, at: int
) -> None:
    """The first load, or the second, beside steps or not: once a piece does not come."""
    loading = WAYS[way]
    fault = Faulty(monkeypatch, at, OSError("the disk is gone"))
    controller = Scripted(script, in_flight, 4)

    def check(server: Server) -> None:
        if server.placement is not None:
            check_books(engine, server, is_pipelined=loading.is_pipelined)

    live = serve(engine, controller, ASKED, loading=loading)
    assert fault.raised == 1
    assert live.events.count("failed") == 1
    assert {r: len(ids) for r, ids in live.outputs.items()} == dict.fromkeys(range(len(ASKED)), 12)
    assert {str(load.placement) for load in live.loads} == {f"{m}@{d}" for m, d in script}
    told = [o.failure for _, o in live.done.log if o.failure is not None]
    assert [f.problem.count("the disk is gone") for f in told] == [1]
    if way == "overlapped" and at == 5:
        assert told[0].what == "fetch", "nobody had to stop"
        assert live.server.batcher.running == 0
    same_again(live, engine, Scripted(script, in_flight, 4), loading)
    # and a good run with the same engine behind it
    again = serve(engine, Scripted(script[-1:], in_flight), ASKED, loading=loading, on_action=check)
    assert "failed" not in again.events
    assert set(again.outputs) == set(live.outputs)


def test_texts_behind_a_failure_are_those_of_a_good_run(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One placement all the time, so the failed load and the requests that start again change no token."""
    good = serve(engine, Scripted([("opt", 6)], "boundary"), ASKED).outputs
    Faulty(monkeypatch, 7, OSError("gone"))
    assert serve(engine, Scripted([("opt", 6)], "boundary"), ASKED).outputs == good


def test_a_failed_load_leaves_nothing_and_can_be_tried_again(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 20)
    Faulty(monkeypatch, 2, RuntimeError("CUDA error"))
    with pytest.raises(LoadError, match=r"llama@6 did not come: CUDA error; nothing is loaded now"):
        hand.load("llama", 6, 20)
    assert engine.placement is None
    assert set(engine.books().values()) == {0}
    hand.load("llama", 6, 20)
    hand.submit(0, prompts([9])[0], 5)
    assert len(hand.finish()[0]) == 5


def test_failures_without_end_end_the_run(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    Faulty(monkeypatch, 2, OSError("worn out"), for_ever=True)
    with pytest.raises(LoadError, match=r"9 actions running failed.*worn out"):
        serve(engine, Scripted(DEEPER, "boundary"), ASKED)


@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupted_load_leaves_an_engine_that_serves(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    Faulty(monkeypatch, at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        serve(engine, Scripted(DEEPER, "extend", 3), ASKED)
    assert engine.placement is None
    assert set(engine.books().values()) == {0}
    live = serve(engine, Scripted(DEEPER, "extend", 3), ASKED, on_action=lambda server: check_books(engine, server))
    assert set(live.outputs) == set(range(len(ASKED)))


def test_an_interrupt_while_weights_come_leaves_an_engine_that_serves(engine: TorchEngine) -> None:
    hand = Hand(engine)
    hand.load("llama", 2, 20)
    engine.perform(Load(Placement("opt", 6), 10, "test", part="begin"))
    engine.reset()
    assert engine.residency.fetch is None
    assert set(serve(engine, Scripted(OTHER, "boundary"), ASKED).outputs) == set(range(len(ASKED)))


# --- memory -----------------------------------------------------------------------------------------------------------


def scarce(most: int) -> Callable[..., Any]:
    """An allocator that has ``most`` bytes."""

    def take(values: int, device: Any, dtype: Any) -> Any:
        if values * dtype.itemsize > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(values, device, dtype)

    return take


def on_a_small_device(folders: dict[str, Path], most: int) -> TorchEngine:
    engine = TorchEngine(folders, budget_bytes=BUDGET)
    engine.residency.arena = Arena(torch.device("cpu"), torch.float32, scarce(most))
    return engine


def test_a_device_with_less_memory_than_said_serves_in_what_there_is(folders: dict[str, Path]) -> None:
    engine = on_a_small_device(folders, BUDGET // 2 + 4096)
    live = serve(engine, Scripted([("opt", 6)], "boundary"), ASKED, on_action=lambda server: server.pool.check())
    assert set(live.outputs) == set(range(len(ASKED)))
    assert live.events.count("failed") == live.events.count("changed") == 1
    assert 0.97 * BUDGET // 2 <= live.server.pool.total_bytes <= BUDGET // 2 + 4096
    assert live.server.pool.total_bytes <= engine.residency.arena.nbytes <= BUDGET // 2 + 4096
    assert [load.part for load in live.loads] == ["whole", "whole"]
    assert live.loads[1].kv_blocks < live.loads[0].kv_blocks
    same_again(live, engine, Scripted([("opt", 6)], "boundary"), Loading())
    good = serve(TorchEngine(folders, budget_bytes=BUDGET), Scripted([("opt", 6)], "boundary"), ASKED)
    assert good.outputs == live.outputs


def test_a_device_too_small_for_the_placement_says_so(folders: dict[str, Path]) -> None:
    engine = on_a_small_device(folders, 50_000)
    with pytest.raises(MemoryBudgetError, match=r"too small: weights need"):
        serve(engine, Scripted([("opt", 6)], "boundary"), ASKED)


def test_an_engine_that_cannot_begin_a_transfer_keeps_what_it_has(folders: dict[str, Path]) -> None:
    engine = TorchEngine(folders)
    room = engine.specs["opt"].weights_bytes(2) + 40 * engine.specs["opt"].block_bytes(2)
    engine.residency.arena = Arena(torch.device("cpu"), torch.float32, scarce(room + 4096))
    hand = Hand(engine)
    hand.load("opt", 2, 40)
    hand.submit(0, prompts([9])[0], 12)
    hand.step()
    before = engine.books()
    with pytest.raises(DeviceMemoryError, match="still is") as caught:
        engine.perform(Load(Placement("llama", 6), 40, "test", part="begin"))
    assert caught.value.is_intact
    assert engine.books() == before
    assert len(hand.finish()[0]) == 12


@pytest.mark.parametrize("most", [1, 2, 3])
def test_steps_that_do_not_fit_are_made_smaller(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    good = serve(engine, Scripted([("opt", 6)], "boundary"), ASKED).outputs
    plain = engine._runner.run

    def run(action: Run) -> Any:
        if len(action.batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(action)

    monkeypatch.setattr(engine._runner, "run", run)
    live = serve(engine, Scripted([("opt", 6)], "boundary"), ASKED, on_action=lambda server: server.pool.check())
    assert live.outputs == good
    assert live.events.count("failed") >= 1
    assert live.server.batcher.max_batch <= most  # type: ignore[attr-defined]
    failed = [action for action, outcome in live.done.log if outcome.failure is not None]
    assert all(isinstance(action, Run) for action in failed)


def test_a_step_that_never_fits_ends_the_run(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(action: Run) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._runner, "run", run)
    with pytest.raises(LoadError, match="no memory for a step"):
        serve(engine, Scripted([("opt", 6)], "boundary"), ASKED)


def test_errors_that_are_nobodys_fault_are_not_hidden(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(action: Run) -> Any:
        raise IndexError("a mistake of ours")

    monkeypatch.setattr(engine._runner, "run", run)
    with pytest.raises(IndexError, match="a mistake of ours"):
        serve(engine, Scripted([("opt", 6)], "boundary"), ASKED)
