"""The fast engine against transformers and the plain one: same tokens, exits, ends and books, strides or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

from heliosim.engines.fast.graphs import rehearse  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.errors import DeviceMemoryError, InputError, UnknownNameError  # noqa: E402
from heliosim.recorder import TableRecorder  # noqa: E402
from heliosim.sampling import Sampling  # noqa: E402
from heliosim.serving.batcher import ContinuousBatcher  # noqa: E402
from heliosim.serving.controller import FixedPlacement  # noqa: E402
from heliosim.serving.helios import BreachCounter, BreachGuard  # noqa: E402
from heliosim.serving.memory import MemoryPool  # noqa: E402
from heliosim.serving.server import Server  # noqa: E402
from heliosim.types import (  # noqa: E402
    TICK,
    Arrival,
    Batch,
    Content,
    ExitRule,
    Idle,
    Load,
    Placement,
    Request,
    Run,
    blocks_for,
)
from tests.contracts.test_torch_engine import (  # noqa: E402
    GREEDY,
    NONE,
    Hand,
    expected,
    llama_config,
    opt_config,
    prompts,
    save,
    save_heads,
)

THRESHOLD = 0.2
RULES = {
    "none": NONE,
    "greedy": GREEDY,
    "full": ExitRule("threshold", THRESHOLD, "full"),
    "deepest": ExitRule("threshold", THRESHOLD),
    "rebatch": ExitRule("threshold", THRESHOLD, "rebatch"),
    "rebatch-copy": ExitRule("threshold", THRESHOLD, "rebatch", "copy"),
    "recompute": ExitRule("threshold", THRESHOLD, "rebatch", "recompute"),
    "gaps": ExitRule("threshold", THRESHOLD, "rebatch", "none"),
    "eager": ExitRule("threshold", THRESHOLD, "eager", quorum=2),
    "eager-copy": ExitRule("threshold", THRESHOLD, "eager", "copy", quorum=2),
}
FORMS = ["full", "deepest", "rebatch", "rebatch-copy", "recompute", "gaps", "eager", "eager-copy"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    anywhere = {"kind": "anywhere", "exits": [2, 3, 6], "head_file": None}
    fixed = {"kind": "fixed", "exits": [2, 3, 6], "head_file": "exit_heads.safetensors"}
    made = {
        "opt": save(root / "opt", opt_config(6), seed=1, exits=fixed),
        "llama": save(root / "llama", llama_config(6), seed=3, exits=anywhere),
    }
    save_heads(made["opt"], [2, 3], 48, 64)
    return made


def fast(folders: dict[str, Path], *, lag: int = 0, pads: bool = False, conditional: bool = False, **rest: Any) -> Any:
    """A fast engine; ``lag`` 1 and ``pads`` do on a CPU what a GPU makes necessary."""
    engine = TorchEngine(folders, mode="fast", **rest)
    runner: Any = engine._runner
    runner.lag, runner.pads, runner.is_conditional = lag, pads, conditional
    return engine


def by_hand(engine: TorchEngine, name: str, rule: ExitRule, chunk: int = 9, depth: int = 6) -> tuple[Any, ...]:
    """Outputs, exits and every outcome of a few ragged requests."""
    hand = Hand(engine, rule)
    hand.load(name, depth)
    for i, prompt in enumerate(prompts([5, 33, 17, 1, 48])):
        hand.submit(i, prompt, 12 + i)
    outputs = hand.finish(chunk)
    assert engine.books()["kv_used_blocks"] == 0
    steps = [
        (o.tokens.requests, o.tokens.ids, o.tokens.exit_layers, o.tokens.lasts, o.layers_run) for o in hand.outcomes
    ]
    return outputs, hand.exits, steps


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(("lag", "pads"), [(0, False), (1, True)])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_tokens_equal_generate(folders: dict[str, Path], name: str, lag: int, pads: bool, chunk: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    outputs, _, _ = by_hand(fast(folders, lag=lag, pads=pads), name, NONE, chunk)
    for i, prompt in enumerate(prompts([5, 33, 17, 1, 48])):
        assert outputs[i] == expected(model, prompt, 12 + i)
    assert len({token for ids in outputs.values() for token in ids}) > 3, "the fixture is degenerate"


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_exits_are_those_of_the_plain_engine(folders: dict[str, Path], name: str, pads: bool, form: str) -> None:
    plain = by_hand(TorchEngine(folders), name, RULES[form])
    assert by_hand(fast(folders, pads=pads, lag=1), name, RULES[form]) == plain
    assert len({layer for layers in plain[1].values() for layer in layers}) > 1, "every token leaves alike"


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("form", ["deepest", "eager", "eager-copy"])
def test_exits_decided_on_the_device(folders: dict[str, Path], name: str, form: str) -> None:
    """Mode C, its conditions asked by the host as no graph holds them here."""
    plain = by_hand(TorchEngine(folders), name, RULES[form])
    assert by_hand(fast(folders, pads=True, conditional=True), name, RULES[form]) == plain


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("form", ["none", "full", "deepest", "rebatch"])
@pytest.mark.parametrize("conditional", [False, True])
def test_what_comes_before_a_capture_leaves_no_trace(
    folders: dict[str, Path], name: str, form: str, conditional: bool
) -> None:
    """A step is rehearsed in the middle of a run, with the rows at hand."""
    engine = fast(folders, lag=1, pads=True, conditional=conditional)
    runner: Any = engine._runner
    rehearsed: list[Any] = []

    def capture(ready: Any, state: Any) -> None:
        if ready not in rehearsed:
            rehearse(ready, state)
            rehearsed.append(ready)

    runner.graphs.capture = capture
    Steps(engine, name, RULES[form], 64).same_as(Steps(TorchEngine(folders), name, RULES[form], 1))
    assert len(rehearsed) > 1


def test_a_partial_placement(folders: dict[str, Path]) -> None:
    assert by_hand(fast(folders), "llama", GREEDY, depth=3) == by_hand(TorchEngine(folders), "llama", GREEDY, depth=3)


def test_more_rows_than_there_was_room_for(folders: dict[str, Path]) -> None:
    found = []
    for engine in (TorchEngine(folders), fast(folders, pads=True)):
        hand = Hand(engine)
        hand.load("opt", 6, blocks=200)
        for i, prompt in enumerate(prompts([3] * 70)):
            hand.submit(i, prompt, 3)
        found.append(hand.finish())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("form", ["greedy", "deepest"])
def test_extend_and_reprefill(folders: dict[str, Path], name: str, form: str) -> None:
    """Going on under a deeper and a shallower placement of the same model, KV kept or computed again."""
    found = []
    for engine in (TorchEngine(folders), fast(folders, lag=1)):
        hand = Hand(engine, RULES[form])
        hand.load(name, 3, stores=True)
        for i, prompt in enumerate(prompts([20, 5])):
            hand.submit(i, prompt, 14)
        for _ in range(4):
            hand.step()
        hand.load(name, 6, stores=True, keep=True)
        hand.step()
        hand.load(name, 2)
        found.append((hand.finish(), hand.exits))
    assert found[0] == found[1]


# --- strides ----------------------------------------------------------------------------------------------------------


class Steps:
    """Everything a served run said, whether it was done in strides or not."""

    def __init__(
        self,
        engine: TorchEngine,
        name: str,
        rule: ExitRule,
        max_stride: int,
        *,
        lengths: Sequence[int | None] = (9, 30, 4, 17, 22, 1),
        blocks: int = 40,
        budget: int = 24,
    ) -> None:
        spec, recorder = engine.specs[name], TableRecorder()
        pool = MemoryPool(spec.weights_bytes(6) + blocks * spec.block_bytes(6))
        batcher = ContinuousBatcher(4, budget, 0.0)
        server = Server(FixedPlacement(spec, rule), batcher, pool, engine.specs, recorder, max_stride)
        for i, (prompt, length) in enumerate(zip(prompts([5, 33, 17, 1, 48, 20]), lengths, strict=True)):
            request = Request(i, 0.0, len(prompt), 30)
            engine.accept(Arrival(request, Content("", tuple(prompt), length)))
            server.submit(request, 0.0)
        now = 0.0
        self.log: list[Any] = []
        while not isinstance(action := server.next_action(now, None, None), Idle):
            outcome = engine.perform(action)
            now += outcome.seconds
            self.log.append((action, outcome))
            server.complete(action, outcome, now)
            held = engine.books()["kv_used_blocks"]
            assert held <= pool.used_blocks, "the engine holds blocks that the pool gave to nobody"
        server.stop()
        tables = recorder.tables()
        self.outputs = engine.take_outputs()
        tokens = tables.tokens.to_pandas()
        columns = ["request_id", "position", "token_id", "exit_layer"]
        self.tokens = tokens[columns].sort_values(["request_id", "position"]).values.tolist()
        self.confidences = tokens.sort_values(["request_id", "position"])[["confidence", "logprob"]].to_numpy()
        steps = tables.steps.to_pandas()
        self.steps = steps[
            ["kind", "layers_run", "rows", "decode_rows", "prefill_tokens", "tokens_out"]
        ].values.tolist()
        self.running = steps[["waiting", "running"]].values.tolist()
        requests = tables.requests.to_pandas().sort_values("request_id")
        self.requests = requests[["request_id", "output_tokens", "status", "preemptions"]].values.tolist()
        self.sums = requests["logprob_sum"].to_numpy() if "logprob_sum" in requests else None
        self.longest = max((len(o.stride) for _, o in self.log if o.stride is not None), default=1)

    def same_as(self, other: Steps) -> None:
        assert self.outputs == other.outputs
        assert self.tokens == other.tokens
        assert self.requests == other.requests
        assert self.steps == other.steps
        assert self.running == other.running
        assert np.allclose(self.confidences, other.confidences, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize(("lag", "pads"), [(0, False), (1, True)])
@pytest.mark.parametrize("form", ["none", "full", "deepest", "eager"])
def test_strides_equal_single_steps(folders: dict[str, Path], name: str, lag: int, pads: bool, form: str) -> None:
    is_conditional = form in ("deepest", "eager")
    single = Steps(TorchEngine(folders), name, RULES[form], 1)
    strided = Steps(fast(folders, lag=lag, pads=pads, conditional=is_conditional), name, RULES[form], 64)
    assert single.longest == 1
    assert strided.longest > 4
    strided.same_as(single)


@pytest.mark.parametrize("lag", [0, 1])
def test_ends_that_nobody_can_foresee(folders: dict[str, Path], lag: int) -> None:
    """End-of-sequence tokens are seen one step late; what a row said behind its end is never reported."""
    found = []
    for max_stride in (1, 64):
        engine = fast(folders, lag=lag, pads=True)
        for host in engine.hosts.values():
            host.info = replace(host.info, eos_ids=tuple(range(0, 256, 9)))
        found.append(Steps(engine, "opt", NONE, max_stride, lengths=[None] * 6))
    found[1].same_as(found[0])
    lengths = {len(ids) for ids in found[0].outputs.values()}
    assert len(lengths) > 2, "texts end alike"
    assert min(lengths) < 30, "no text ends by itself"
    assert found[1].longest > 2


@pytest.mark.parametrize("blocks", [9, 12])
def test_strides_with_little_memory(folders: dict[str, Path], blocks: int) -> None:
    """Requests give up their KV and come back; the engine never holds other blocks than the pool says."""
    single = Steps(TorchEngine(folders), "llama", NONE, 1, blocks=blocks)
    strided = Steps(fast(folders, lag=1, pads=True), "llama", NONE, 64, blocks=blocks)
    strided.same_as(single)
    assert blocks > 9 or any(row[3] for row in single.requests), "nobody gave way"


def decoding(engine: TorchEngine, name: str, depth: int = 3) -> tuple[Hand, Callable[..., Run]]:
    """Four requests that decode, and what makes a run of all of them."""
    hand = Hand(engine, GREEDY)
    hand.load(name, depth)
    for i, prompt in enumerate(prompts([5, 33, 17, 2])):
        hand.submit(i, prompt, 40)
    hand.step()

    def run(**rest: Any) -> Run:
        requests = tuple(hand.known)
        starts = tuple(hand.computed[r] for r in requests)
        batch = Batch(requests, starts, (1,) * len(requests), (True,) * len(requests))
        return Run(Placement(name, depth), GREEDY, batch, in_stride=True, **rest)

    return hand, run


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("limit", [11, 30])
def test_a_guard_stops_a_stride_where_single_steps_would(folders: dict[str, Path], lag: int, limit: int) -> None:
    plain, _ = decoding(TorchEngine(folders), "opt")
    breaches = [sum(c < 0.9 for c in plain.step().tokens.confidences) for _ in range(20)]
    counter = BreachCounter("sliding", 100)
    steps = next(k for k in range(20) if sum(breaches[: k + 1]) > limit) + 1
    assert 1 < steps < 20, "the fixture trips at once or never"
    _, run = decoding(engine := fast(folders, lag=lag, pads=True), "opt")
    outcome = engine.perform(run(max_steps=20, guard=BreachGuard(counter, 0.9, limit)))
    assert outcome.stride is not None
    assert len(outcome.stride) == steps
    said = outcome.stride.tokens.confidences
    assert int((said < 0.9).sum()) == sum(breaches[:steps])


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stride_ends_when_an_arrival_is_due(folders: dict[str, Path], lag: int) -> None:
    engine = fast(folders, lag=lag)
    _, run = decoding(engine, "llama")
    ticking: Iterator[float] = iter(range(10**6))
    engine.keep_time(lambda: float(next(ticking)))
    outcome = engine.perform(run(max_steps=20, within_s=5.0))
    assert outcome.stride is not None
    assert len(outcome.stride) == 5, "every step takes a second"
    assert outcome.seconds == 5.0
    assert engine.books()["kv_used_blocks"] == sum(blocks_for(n + 5) for n in (5, 33, 17, 2))
    alone = run(max_steps=20, within_s=0.0)
    alone.batch.ticks += 5
    assert len(engine.perform(alone).tokens) == 4, "no time is left: one step"


def test_a_stride_passes_ends_or_stops_there(folders: dict[str, Path]) -> None:
    found = []
    for max_ends in (1, 2, None):
        engine = fast(folders, lag=1, pads=True)
        hand = Hand(engine, NONE)
        hand.load("opt", 6)
        for i, (prompt, length) in enumerate(zip(prompts([5, 9, 3]), (4, 9, 13), strict=True)):
            hand.submit(i, prompt, length)
        hand.step()
        batch = Batch((0, 1, 2), (5, 9, 3), (1, 1, 1), (True, True, True))
        outcome = engine.perform(Run(Placement("opt", 6), NONE, batch, max_steps=50, max_ends=max_ends))
        found.append((len(outcome.stride), [(step, r) for step, r, _ in outcome.stride.ended]))
        rows = [step.rows for step in outcome.stride.steps]
        assert rows == [3] * min(3, len(rows)) + [2] * min(5, max(0, len(rows) - 3)) + [1] * max(0, len(rows) - 8)
    ends = [(2, 0), (7, 1), (11, 2)]
    assert found == [(3, ends[:1]), (8, ends[:2]), (12, ends)]


@pytest.mark.parametrize("lag", [0, 1])
def test_a_device_that_runs_out_of_memory_ends_a_stride(folders: dict[str, Path], lag: int) -> None:
    """What was done counts, and the step that failed is tried again as the first of a run, which then fails."""
    engine = fast(folders, lag=lag)
    _, run = decoding(engine, "opt")
    runner: Any = engine._runner
    launch, count = runner._launch, iter(range(100))

    def fails_at_the_fourth(*args: Any) -> None:
        if next(count) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        launch(*args)

    runner._launch = fails_at_the_fourth
    outcome = engine.perform(run(max_steps=9))
    assert len(outcome.stride) == 3
    again = run(max_steps=9)
    again.batch.ticks += 3
    with pytest.raises(DeviceMemoryError):
        engine.perform(again)
    assert engine.books()["kv_used_blocks"] == sum(blocks_for(n + 3) for n in (5, 33, 17, 2))
    runner._launch = launch
    assert len(engine.perform(again).stride) == 9


# --- memory -----------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts results that are memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.made.append(str(func))
        return result


def test_a_stride_allocates_nothing_outside_its_steps(folders: dict[str, Path]) -> None:
    """What a GPU does by replaying a graph is a call here, whose own temporaries do not count."""
    engine = fast(folders, lag=1, pads=True)
    hand, run = decoding(engine, "llama")
    engine.perform(run(max_steps=6))
    runner: Any = engine._runner
    for ready in runner.graphs._ready.values():
        ready.go = _apart(ready.step)
    again = run(max_steps=6)
    again.batch.ticks += 6
    with Allocations() as seen:
        outcome = engine.perform(again)
    assert len(outcome.stride) == 6
    assert seen.made == []
    assert hand.engine is engine


def _apart(step: Callable[[], None]) -> Callable[[], None]:
    def go() -> None:
        with _disable_current_modes():
            step()

    return go


# --- sampling ---------------------------------------------------------------------------------------------------------


WARM = Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=7)


@pytest.mark.parametrize("form", ["none", "full", "deepest", "rebatch"])
def test_draws_do_not_depend_on_engine_or_stride(folders: dict[str, Path], form: str) -> None:
    plain = by_hand(TorchEngine(folders, sampling=WARM), "llama", RULES[form])
    assert by_hand(fast(folders, sampling=WARM, lag=1, pads=True), "llama", RULES[form]) == plain
    greedy = by_hand(TorchEngine(folders), "llama", RULES[form])
    assert plain[0] != greedy[0]
    strided = Steps(fast(folders, sampling=WARM, lag=1, pads=True), "llama", RULES[form], 64)
    strided.same_as(Steps(TorchEngine(folders, sampling=WARM), "llama", RULES[form], 1))


def test_draws_do_not_depend_on_who_runs_beside(folders: dict[str, Path]) -> None:
    together = by_hand(fast(folders, sampling=WARM, pads=True), "opt", NONE)[0]
    for i, prompt in enumerate(prompts([5, 33, 17, 1, 48])):
        hand = Hand(fast(folders, sampling=WARM))
        hand.load("opt", 6)
        hand.submit(i, prompt, 12 + i)
        assert hand.finish()[i] == together[i]


def test_another_seed_is_another_text(folders: dict[str, Path]) -> None:
    texts = [by_hand(fast(folders, sampling=Sampling(temperature=1.5, seed=s)), "opt", NONE)[0] for s in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_engine_says_what_it_runs_on(folders: dict[str, Path]) -> None:
    assert TorchEngine(folders).describe() == "plain engine"
    assert TorchEngine(folders, mode="fast").describe() == "fast engine, attention sdpa"


def test_what_an_engine_cannot_do_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="conditional graph nodes need a GPU"):
        TorchEngine(folders, mode="conditional")
    with pytest.raises(UnknownNameError, match=r"live\.engine"):
        TorchEngine(folders, mode="quick")
    with pytest.raises(InputError, match="one way of its own"):
        TorchEngine(folders, attention="flex")
    with pytest.raises(InputError, match="attention"):
        TorchEngine(folders, mode="fast", attention="varlen")


def test_flex_attention_serves(folders: dict[str, Path]) -> None:
    """Uncompiled it is slow, so this is a short text."""
    found = []
    for engine in (TorchEngine(folders), fast(folders, pads=True, attention="flex")):
        hand = Hand(engine)
        hand.load("llama", 2, blocks=6)
        for i, prompt in enumerate(prompts([18, 3, 5])):
            hand.submit(i, prompt, 2)
        found.append(hand.finish())
    assert found[0] == found[1]


def test_loads_between_models(folders: dict[str, Path]) -> None:
    engine = fast(folders, lag=1, pads=True)
    first = by_hand(engine, "opt", NONE)
    second = by_hand(engine, "llama", NONE)
    assert by_hand(engine, "opt", NONE) == first
    assert second == by_hand(TorchEngine(folders), "llama", NONE)
    assert engine.perform(Load(Placement("opt", 2), 5, "test")).seconds >= TICK
