"""The arena, loads beside steps and changes of placement on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.serving.memory import MemoryPool  # noqa: E402
from heliosim.types import InFlight, Load, Placement  # noqa: E402
from tests.contracts.test_residency import (  # noqa: E402
    BUDGET,
    SCRIPTS,
    WAYS,
    Scripted,
    arrivals,
    check_books,
    check_changes,
    serve,
)
from tests.contracts.test_residency_failures import Faulty  # noqa: E402
from tests.contracts.test_torch_engine import (  # noqa: E402
    GREEDY,
    Hand,
    folders,
    llama_config,
    one_thread,
    prompts,
    reference,
    save,
)

__all__ = ["folders", "one_thread", "reference"]  # fixtures
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("mode", ["plain", "fast"])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["boundary", "reprefill", "extend"])
def test_tokens_are_those_of_transformers_behind_every_change(
    folders: dict[str, Path], reference: Callable[..., Any], mode: str, script: str, way: str, how: InFlight
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check_changes(TorchEngine(folders, device="cuda", mode=mode), folders, reference, script, way, how)


def test_loads_take_no_memory_from_the_device(folders: dict[str, Path]) -> None:
    """Behind a first round over all placements, nothing more is reserved, and the arena is where it was."""
    engine = TorchEngine(folders, device="cuda", budget_bytes=BUDGET)
    pool, hand = MemoryPool(BUDGET), Hand(engine, GREEDY)
    seen = []
    for n in range(3):
        for k, (model, depth) in enumerate([("opt", 2), ("opt", 6), ("llama", 6), ("llama", 2), ("opt", 3)]):
            spec = engine.specs[model]
            pool.place(spec.weights_bytes(depth), spec.block_bytes(depth))
            hand.load(model, depth, pool.total_blocks)
            hand.submit(100 * n + k, prompts([20])[0], 3)
            hand.finish()
        stats = torch.cuda.memory_stats()
        seen.append(
            (
                stats["reserved_bytes.all.current"],
                stats["segment.all.allocated"],
                engine.residency.arena.data.data_ptr(),
            )
        )
    assert seen[1] == seen[2]
    assert seen[0][2] == seen[2][2]
    assert engine.residency.arena.allocations == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_behind_a_copy_that_failed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    engine = TorchEngine(folders, device="cuda", budget_bytes=BUDGET)
    asked = arrivals([9, 30, 17, 4, 21, 12])
    Faulty(monkeypatch, 5, OSError("the disk is gone"))
    script = Scripted([("llama", 2), ("llama", 6)], "extend", 4)
    live = serve(engine, script, asked, loading=WAYS[way])
    assert live.events.count("failed") == 1
    assert set(live.outputs) == set(range(len(asked)))
    again = serve(engine, Scripted([("opt", 6)], "boundary"), asked, on_action=lambda s: check_books(engine, s))
    assert set(again.outputs) == set(range(len(asked)))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers of 100 MB, in bfloat16."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = llama_config(8, **sizes, head_dim=128, initializer_range=0.02)
    folder = tmp_path_factory.mktemp("large") / "large"
    return save(folder, config, seed=8, exits={"kind": "anywhere", "exits": [2, 4, 6, 8], "head_file": None})


def test_layers_come_at_the_speed_of_pinned_memory_and_steps_go_on(large: Path) -> None:
    """A load takes at most 1.25 times what one copy of as many bytes takes; decoding beside it is hardly slower."""
    engine = TorchEngine({"large": large}, device="cuda", dtype="bfloat16", budget_bytes=2 << 30)
    hand = Hand(engine, GREEDY)
    spec = engine.specs["large"]
    hand.load("large", 2, 64)
    hand.submit(0, prompts([20])[0], 120)
    for _ in range(20):
        hand.step()
    alone = statistics.median(hand.step().seconds for _ in range(30))
    wanted = spec.weights_bytes(8) - spec.weights_bytes(2)
    host = torch.empty(wanted, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(wanted, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    engine.perform(Load(Placement("large", 8), 64, "test", part="begin"))
    assert engine.residency.fetch is not None
    beside = []
    while engine.residency.fetch.done_at is None:
        beside.append(hand.step().seconds)
    copies = engine.residency.copies[-6:]
    assert sum(copy.nbytes for copy in copies) == wanted
    took = copies[-1].ended_s - copies[0].began_s
    assert took <= 1.25 * statistics.median(times), "less than 80 % of the bandwidth of pinned memory"
    assert beside
    assert statistics.median(beside) <= 1.25 * alone
