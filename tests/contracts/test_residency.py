"""What the engine holds, through every change of placement: tokens of transformers, fixed addresses, balanced books."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from heliosim.drive import Finished  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.live import serve_live  # noqa: E402
from heliosim.recorder import TableRecorder  # noqa: E402
from heliosim.serving.batcher import ContinuousBatcher  # noqa: E402
from heliosim.serving.controller import Note  # noqa: E402
from heliosim.serving.loading import HostTier, Loading  # noqa: E402
from heliosim.serving.memory import MemoryPool  # noqa: E402
from heliosim.serving.server import Server  # noqa: E402
from heliosim.types import (  # noqa: E402
    Arrival,
    Content,
    Directive,
    InFlight,
    Load,
    Placement,
    Request,
    Run,
    blocks_for,
)
from heliosim.workload import OpenLoop  # noqa: E402
from tests.contracts.test_torch_engine import (  # noqa: E402
    GREEDY,
    Hand,
    adapted_logits,
    engine,
    expected,
    folders,
    one_thread,
    prompts,
    reference,
)

__all__ = ["engine", "folders", "one_thread", "reference"]  # fixtures
BUDGET = 1_600_000


@dataclass
class Scripted:
    """Wants the placements of ``script`` one after the other, each for ``steps`` runs on it, the last for ever."""

    script: Sequence[tuple[str, int]]
    in_flight: InFlight
    steps: int = 5
    breaches: int = field(default=0, init=False)
    seen: int = field(default=0, init=False)

    def breaches_over(self, steps: int) -> Sequence[int]:
        return [0] * steps

    def decide(self, now: float, status: Any) -> Directive:
        return Directive(self.wanted, GREEDY, in_flight=self.in_flight, reason="script")

    @property
    def wanted(self) -> Placement:
        return Placement(*self.script[min(self.seen // self.steps, len(self.script) - 1)])

    def observe(self, now: float, run: Run, outcome: Any, served: Any, started: int) -> None:
        self.seen += run.placement == self.wanted

    def take_notes(self) -> list[Note]:
        return []


@dataclass
class Live:
    """A live run: its server, its log, its tables."""

    server: Server
    done: Finished
    recorder: TableRecorder
    outputs: dict[int, list[int]]

    @property
    def events(self) -> list[str]:
        return [str(kind) for kind in self.recorder.tables().events["kind"].to_pylist()]

    @property
    def loads(self) -> list[Load]:
        return [action for action, _ in self.done.log if isinstance(action, Load)]


def arrivals(lengths: Sequence[int], output: int = 12) -> list[Arrival]:
    asked = prompts(lengths)
    return [Arrival(Request(i, 0.0, len(p), output), Content("", tuple(p), output)) for i, p in enumerate(asked)]


def serve(
    engine: TorchEngine,
    controller: Any,
    asked: Sequence[Arrival],
    *,
    budget: int = BUDGET,
    loading: Loading | None = None,
    rows: int = 4,
    on_action: Callable[[Server], None] | None = None,
) -> Live:
    """Serve live to the end, on the clock of the CPU."""
    engine.reset()
    recorder = TableRecorder()
    server = Server(
        controller, ContinuousBatcher(rows, 40), MemoryPool(budget), engine.specs, recorder, loading=loading
    )
    progress = None if on_action is None else (lambda now: on_action(server))
    done = serve_live(server, engine, OpenLoop(asked), "cpu", on_progress=progress)
    return Live(server, done, recorder, engine.take_outputs())


def check_books(engine: TorchEngine, server: Server, *, is_pipelined: bool = False) -> None:
    """The pool's books are the engine's, and weights and KV lie side by side in the arena."""
    held, pool, residency = engine.books(), server.pool, engine.residency
    assert held["kv_blocks"] == pool.total_blocks
    assert held["kv_bytes"] == pool.kv_total_bytes
    assert held["kv_used_blocks"] == sum(blocks_for(n) for _, n in server.batcher.in_kv() if n)
    if is_pipelined:
        assert held["weights_bytes"] <= pool.weights_bytes
    else:
        assert held["weights_bytes"] == pool.weights_bytes
    under_way = 0 if residency.fetch is None else pool.reserved_bytes
    assert pool.weights_bytes + under_way + held["kv_bytes"] <= residency.arena.nbytes
    if residency.kv is not None:
        held_blocks = [block for table in residency.kv.tables.values() for block in table]
        assert len(held_blocks) == len(set(held_blocks))
        assert all(block >= residency.kv.first_block for block in held_blocks)


def check_tokens(live: Live, asked: Sequence[Arrival], say: Callable[[Placement, list[int]], Any]) -> None:
    """Every token is the likeliest that its placement's model finds behind the text before it."""
    texts = {a.request.id: list(a.content.prompt_ids or ()) for a in asked}
    told: dict[int, list[tuple[Placement, int]]] = {a.request.id: [] for a in asked}
    for action, outcome in live.done.log:
        if isinstance(action, Run):
            for request, token in zip(outcome.tokens.requests, outcome.tokens.ids or (), strict=True):
                told[request].append((action.placement, token))
    assert len({placement for tokens in told.values() for placement, _ in tokens}) > 1, "the run changed nothing"
    for request, tokens in told.items():
        text = [*texts[request], *(token for _, token in tokens)]
        assert live.outputs[request] == text[len(texts[request]) :]
        for placement in {p for p, _ in tokens}:
            best = say(placement, text).argmax(-1).tolist()
            for k, (where, token) in enumerate(tokens):
                if where == placement:
                    assert token == best[len(texts[request]) + k - 1], (request, k, placement)


WAYS = {
    "blocking": Loading(),
    "overlapped": Loading(overlaps=True),
    "pipelined": Loading(is_pipelined=True),
    "both": Loading(overlaps=True, is_pipelined=True),
}
SCRIPTS = {
    "opt": [("opt", 2), ("opt", 3), ("opt", 6), ("opt", 2)],
    "llama": [("llama", 1), ("llama", 4), ("llama", 5), ("llama", 6), ("llama", 3)],
    "switches": [("llama", 2), ("opt", 6), ("llama-b", 4), ("opt", 3)],
}


def check_changes(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], script: str, way: str, how: InFlight
) -> None:
    """Run a script live; every token is transformers', the books balance, every placement was there."""
    # who runs at the boundary ends first, four at a time
    asked = arrivals([9, 30, 17, 4, 21, 12, 6, 8, 14, 11] * (2 if how == "boundary" else 1), 10)

    def say(placement: Placement, text: list[int]) -> Any:
        layers = engine.specs[placement.model].layers
        if placement.model == "opt" and placement.depth < layers:
            return adapted_logits(reference("opt"), folders["opt"], text, placement.depth)
        with torch.inference_mode():
            cut = None if placement.depth == layers else placement.depth
            return reference(placement.model, cut)(torch.tensor([text])).logits[0]

    loading = WAYS[way]
    live = serve(
        engine,
        Scripted(SCRIPTS[script], how, 3),
        asked,
        loading=loading,
        on_action=lambda server: check_books(engine, server, is_pipelined=loading.is_pipelined),
    )
    check_tokens(live, asked, say)
    reached = [load.placement for load in live.loads if load.part in ("whole", "finish")]
    assert len(set(reached)) == len(set(SCRIPTS[script]))
    if loading.overlaps:
        assert any(load.part == "begin" for load in live.loads)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["boundary", "reprefill", "extend"])
def test_tokens_are_those_of_transformers_behind_every_change(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], script: str, way: str, how: InFlight
) -> None:
    check_changes(engine, folders, reference, script, way, how)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("way", "how"), [("blocking", "extend"), ("overlapped", "boundary"), ("both", "reprefill")])
def test_prepared_steps_follow_every_change(
    folders: dict[str, Path], reference: Callable[..., Any], script: str, way: str, how: InFlight
) -> None:
    """The fast engine's steps know addresses: they must be those of what is resident now."""
    check_changes(TorchEngine(folders, mode="fast"), folders, reference, script, way, how)


def test_extending_where_the_new_block_has_no_room_for_states(
    engine: TorchEngine, reference: Callable[..., Any]
) -> None:
    """One layer of grouped KV is smaller than a hidden state, so these wait in host memory."""
    hand = Hand(engine, GREEDY)
    hand.load("llama", 5, 20, stores=True)
    asked = prompts([18, 40])
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 20)
    for _ in range(5):
        hand.step()
    kv = engine.residency.kv
    assert kv is not None
    assert not kv.has_room_for_hidden(6, keeps_hidden=False)
    early = {i: engine.generated(i) for i in range(2)}
    hand.load("llama", 6, 20, stores=True, keep=True)
    outputs = hand.finish()
    for i, prompt in enumerate(asked):
        assert outputs[i][5:] == expected(reference("llama"), prompt + early[i], 15)


# --- addresses --------------------------------------------------------------------------------------------------------


def addresses(engine: TorchEngine) -> dict[tuple[str, int], int]:
    resident, kv = engine.residency.held()
    found = {("layer", i): layer.qkv_weight.data_ptr() for i, layer in enumerate(resident.layers)}
    found["base", 0] = resident.base["embed"].data_ptr()
    return found | {("kv", i): layer.data.data_ptr() for i, layer in enumerate(kv.layers)}


def test_nothing_is_allocated_and_no_layer_moves_once_the_arena_is_there(folders: dict[str, Path]) -> None:
    engine = TorchEngine(folders, budget_bytes=BUDGET)
    pool = MemoryPool(BUDGET)
    hand = Hand(engine, GREEDY)
    first: dict[Placement, dict[tuple[str, int], int]] = {}
    seen: dict[tuple[str, str, int], int] = {}
    arena = None
    steps = [("opt", 2), ("opt", 6), ("llama", 6), ("llama", 2), ("llama", 6), ("opt", 6), ("opt", 2), ("llama-b", 4)]
    for n, (model, depth) in enumerate(steps):
        spec = engine.specs[model]
        pool.place(spec.weights_bytes(depth), spec.block_bytes(depth))
        hand.load(model, depth, pool.total_blocks)
        hand.submit(n, prompts([20])[0], 3)
        hand.finish()
        at = (
            engine.residency.arena.data.data_ptr(),
            engine.residency.arena.nbytes,
            engine.residency._scratch().data_ptr(),
        )
        arena = arena or at
        assert at == arena
        assert engine.residency.arena.allocations == 1
        found = addresses(engine)
        assert first.setdefault(engine.placement, found) == found  # type: ignore[arg-type]
        for (kind, i), address in found.items():
            if kind != "kv":
                assert seen.setdefault((model, kind, i), address) == address
    assert arena is not None
    assert BUDGET <= arena[1] < BUDGET + 4096


def test_a_dropped_layer_becomes_kv_blocks_and_takes_them_back(folders: dict[str, Path]) -> None:
    engine, hand = TorchEngine(folders, budget_bytes=BUDGET), None
    spec, pool = engine.specs["llama"], MemoryPool(BUDGET)
    hand = Hand(engine, GREEDY)
    lowest = {}
    for depth in (6, 3, 6):
        pool.place(spec.weights_bytes(depth), spec.block_bytes(depth))
        hand.load("llama", depth, pool.total_blocks)
        resident, kv = engine.residency.held()
        lowest[depth] = kv.cells[kv.first_block].data_ptr()
        last = resident.layers[-1].down_weight
        end = last.data_ptr() + last.nbytes
        assert end <= lowest[depth] < end + spec.block_bytes(depth) + 4096, "no block's room lies idle"
        if depth == 3:
            hand.submit(0, prompts([150])[0], 4)
            hand.submit(1, prompts([150], seed=1)[0], 4)
            hand.step()
            assert kv.used_blocks == 20
            hand.evict(0, 1)
            hand.known.clear()
    assert lowest[3] < lowest[6]


def test_only_blocks_in_the_way_of_arriving_weights_move(folders: dict[str, Path]) -> None:
    engine = TorchEngine(folders, budget_bytes=BUDGET)
    spec = engine.specs["llama"]
    hand = Hand(engine, GREEDY)
    total = (BUDGET - spec.weights_bytes(3)) // spec.block_bytes(3)
    hand.load("llama", 3, total)
    kv = engine.residency.held()[1]
    many = total // 10
    for i in range(many):  # so many that some lie where weights are to come
        hand.submit(i, prompts([150], seed=i)[0], 8)
    hand.step()
    hand.evict(*range(2, many))
    for i in range(2, many):
        hand.known.pop(i)
    hand.submit(many, prompts([40])[0], 8)
    hand.step()
    before = {request: list(table) for request, table in kv.tables.items()}
    left = (BUDGET - spec.weights_bytes(6)) // spec.block_bytes(3)
    first = kv.grid_blocks - left
    assert any(block < first for table in before.values() for block in table)
    hand.engine.perform(Load(Placement("llama", 6), left, "test", part="begin"))
    for request, table in kv.tables.items():
        for old, new in zip(before[request], table, strict=True):
            assert (new == old) if old >= first else new >= first
    text = hand.finish()
    assert len(text) == 3


# --- from disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama", "llama-b"])
def test_weights_come_from_disk_through_two_small_buffers(
    folders: dict[str, Path], reference: Callable[..., Any], name: str
) -> None:
    engine = TorchEngine(folders, host_bytes=0)
    assert sum(host.host_bytes for host in engine.hosts.values()) == 0
    hand, prompt, layers = Hand(engine), prompts([20])[0], engine.specs[name].layers
    spec = engine.specs[name]
    engine.perform(Load(Placement(name, layers), 40, "test", disk_bytes=spec.weights_bytes(layers), host=()))
    hand.submit(0, prompt, 10)
    assert hand.finish()[0] == expected(reference(name), prompt, 10)
    ring, host = engine.residency.ring, engine.hosts[name]
    assert host.host_bytes == 0
    assert 0 < ring.nbytes <= 2 * 4 * max(h.largest for h in engine.hosts.values())
    if name == "opt":
        assert host.place("base", 0)[1] > ring.values, "the base is read in parts"
    assert {copy.source for copy in engine.residency.copies} == {"disk"}


def test_host_memory_is_filled_with_whole_models_in_their_order(folders: dict[str, Path]) -> None:
    specs = TorchEngine(folders).specs
    room = specs["opt"].weights_bytes(6) + specs["llama-b"].weights_bytes(4)
    engine = TorchEngine({name: folders[name] for name in ("opt", "llama", "llama-b")}, host_bytes=room)
    held = {name: host.host_bytes for name, host in engine.hosts.items()}
    tier = HostTier(room, {name: specs[name] for name in ("opt", "llama", "llama-b")})
    assert {name: n for name, n in held.items() if n} == {n: specs[n].weights_bytes(d) for n, d in tier.held}


def test_a_run_over_the_disk_tier_says_what_a_run_from_memory_says(folders: dict[str, Path]) -> None:
    asked, script = arrivals([9, 30, 17, 4]), SCRIPTS["switches"]
    outputs = []
    for room in (None, 150_000, 0):
        engine = TorchEngine(folders, host_bytes=room)
        tier = None if room is None else HostTier(room, engine.specs)
        live = serve(engine, Scripted(script, "boundary"), asked, loading=Loading(host=tier))
        outputs.append(live.outputs)
        sources = {copy.source for copy in engine.residency.copies}
        assert ("disk" in sources) == (room is not None)
    assert outputs[0] == outputs[1] == outputs[2]


def test_every_copy_is_on_record(engine: TorchEngine) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 20)
    hand.submit(0, prompts([9])[0], 30)
    hand.step()
    engine.perform(Load(Placement("opt", 6), 20, "test", part="begin"))
    assert engine.residency.fetch is not None
    engine.residency.fetch.wait()
    copies, spec = engine.residency.copies, engine.specs["opt"]
    assert sum(copy.nbytes for copy in copies) == spec.weights_bytes(6)
    assert [(c.kind, c.number) for c in copies] == engine.hosts["opt"].pieces(6)
    assert all(a.ended_s <= b.ended_s for a, b in pairwise(copies))
    assert all(copy.began_s < copy.ended_s for copy in copies)


# --- books ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path]) -> TorchEngine:
    return TorchEngine(folders, budget_bytes=3 * BUDGET)


places = st.sampled_from(
    [("opt", 2), ("opt", 3), ("opt", 6), ("llama", 1), ("llama", 3), ("llama", 5), ("llama", 6), ("llama-b", 4)]
)


@settings(max_examples=20, deadline=None)
@given(
    script=st.lists(places, min_size=1, max_size=6),
    steps=st.integers(1, 5),
    in_flight=st.sampled_from(["boundary", "reprefill", "extend"]),
    way=st.sampled_from(sorted(WAYS)),
    room=st.sampled_from([1.02, 1.1, 1.5, 3.0]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    output=st.integers(1, 12),
)
def test_books_balance_whatever_happens(
    shared: TorchEngine,
    script: list[tuple[str, int]],
    steps: int,
    in_flight: InFlight,
    way: str,
    room: float,
    lengths: list[int],
    output: int,
) -> None:
    """Little room makes the server evict; the arena is the same all the while."""
    most = max(shared.specs[m].weights_bytes(d) + 5 * shared.specs[m].block_bytes(d) for m, d in script)
    asked, loading = arrivals(lengths, output), WAYS[way]
    actions = []

    def check(server: Server) -> None:
        server.pool.check()
        check_books(shared, server, is_pipelined=loading.is_pipelined)
        actions.append(server.placement)

    live = serve(
        shared, Scripted(script, in_flight, steps), asked, budget=int(room * most), loading=loading, on_action=check
    )
    assert len(actions) == len(live.done.log)
    ended = {record["request_id"] for record in live.recorder.tables().requests.to_pylist()}
    assert ended == set(range(len(asked)))
    assert shared.residency.arena.allocations == 1
    assert all(len(ids) == output for ids in live.outputs.values())
