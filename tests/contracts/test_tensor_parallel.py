"""Two ranks act as one engine: the tokens of one process and of transformers, and half of everything on each rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heliosim_calibrate.experiment import workload, write_workload  # noqa: E402

from heliosim.engines.models.host import HostModel  # noqa: E402
from heliosim.engines.parallel.cutting import rank_info  # noqa: E402
from heliosim.engines.parallel.engine import ParallelEngine  # noqa: E402
from heliosim.engines.parallel.facts import ranked  # noqa: E402
from heliosim.engines.parallel.team import LostRankError, Watch  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.errors import HelioSimError, InputError, MemoryBudgetError  # noqa: E402
from heliosim.examples import scenario_for  # noqa: E402
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint  # noqa: E402
from heliosim.hardware.architecture import ExitHead, read_architecture  # noqa: E402
from heliosim.profile_view import open_profile  # noqa: E402
from heliosim.runs import run_live  # noqa: E402
from heliosim.types import Arrival, Batch, Content, ExitRule, Load, Placement, Request, Run  # noqa: E402
from tests.contracts.test_torch_engine import (  # noqa: E402
    GREEDY,
    NONE,
    VOCAB,
    Hand,
    expected,
    folders,
    llama_config,
    one_thread,
    opt_config,
    prompts,
    reference,
    save,
    save_heads,
)

__all__ = ["folders", "one_thread", "reference"]  # fixtures


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path]) -> Iterator[TorchEngine]:
    with_replicated = {"llama": folders["llama"], "llama-b": folders["llama-b"], "opt": folders["opt"]}
    engine = TorchEngine(with_replicated, tensor_parallel=2, timeout_s=30.0)
    yield engine
    engine.close()


@pytest.fixture
def engine(pair: TorchEngine) -> TorchEngine:
    pair.reset()
    return pair


def alone(folders: dict[str, Path]) -> TorchEngine:
    return TorchEngine({name: folders[name] for name in ("llama", "llama-b", "opt")})


@pytest.mark.parametrize("name", ["opt", "llama", "llama-b"])
def test_tokens_equal_generate_and_one_process(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], name: str
) -> None:
    asked = prompts([5, 16, 33, 2, 17])
    texts = []
    for each in (engine, alone(folders)):
        hand = Hand(each)
        hand.load(name, each.specs[name].layers)
        for i, prompt in enumerate(asked):
            hand.submit(i, prompt, 10 + i)
        texts.append(hand.finish(chunk=7))
    assert texts[0] == texts[1] == {i: expected(reference(name), p, 10 + i) for i, p in enumerate(asked)}


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_log_probabilities_equal_those_of_one_process(engine: TorchEngine, folders: dict[str, Path], name: str) -> None:
    texts = prompts([40, 9])
    layers = engine.specs[name].exits
    together, single = engine.score(name, texts, layers), alone(folders).score(name, texts, layers)
    for a, b in zip(together, single, strict=True):
        assert (a.ids == b.ids).all()
        assert abs(a.logprobs - b.logprobs).max() < 1e-5
        assert abs(a.max_probs - b.max_probs).max() < 1e-5


def test_exits_loads_switches_and_extension(engine: TorchEngine, folders: dict[str, Path]) -> None:
    """Threshold exits, LD under running requests (extend), SW, a transfer beside steps: as one process."""
    runs = []
    for each in (engine, alone(folders)):
        hand = Hand(each, ExitRule("threshold", 0.3))
        hand.load("llama", 6)
        for i, prompt in enumerate(prompts([9, 30, 4])):
            hand.submit(i, prompt, 12)
        threshold = hand.finish()
        exits = dict(hand.exits)
        hand = Hand(each, GREEDY)
        hand.load("opt", 2, stores=True)
        hand.submit(0, prompts([9])[0], 20)
        for _ in range(5):
            hand.step()
        hand.load("opt", 6, 30, keep=True)
        deepened = hand.finish()
        begun = Load(Placement("llama-b", 4), 20, "test", part="begin")
        each.perform(begun)
        each.perform(Load(Placement("llama-b", 4), 40, "test", part="finish"))
        hand.submit(1, prompts([12])[0], 10)
        switched = hand.finish()
        runs.append((threshold, exits, deepened, switched))
    assert runs[0] == runs[1]
    assert len({e for left in runs[0][1].values() for e in left}) > 1, "the fixture never leaves early"


@pytest.mark.parametrize("name", ["opt", "llama", "llama-b"])
def test_books_of_a_rank_are_those_of_its_facts(engine: TorchEngine, folders: dict[str, Path], name: str) -> None:
    spec, whole = engine.specs[name], inspect_checkpoint(folders[name], "float32").spec
    engine.perform(Load(Placement(name, spec.layers), 40, "test"))
    books = engine.books()
    assert books["weights_bytes"] == spec.weights_bytes(spec.layers)
    assert books["kv_bytes"] == 40 * spec.block_bytes(spec.layers)
    assert spec.kv_bytes_per_token_layer * 2 == whole.kv_bytes_per_token_layer
    assert spec.layer_bytes < 0.6 * whole.layer_bytes


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["opt", "llama", "llama-b"])
def test_bytes_of_a_rank_are_those_of_the_architecture(tmp_path: Path, name: str, ranks: int, rank: int) -> None:
    """4 ranks share 2 KV heads: each is held twice."""
    exits = {"kind": "fixed", "exits": [2, 4], "head_file": "exit_heads.safetensors"} if name == "opt" else None
    config = {
        "opt": opt_config(4, vocab_size=200),
        "llama": llama_config(4, num_attention_heads=8, num_key_value_heads=2, vocab_size=200),
        "llama-b": llama_config(4, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False),
    }[name]
    folder = save(tmp_path / name, config, seed=1, exits=exits)
    if exits:
        save_heads(folder, [2], 48, 64)
    spec = rank_info(inspect_checkpoint(folder, "float32"), rank, ranks).spec
    shape = read_architecture(folder / "config.json")
    assert spec.layer_bytes == shape.layer_bytes("float32", ranks)
    assert spec.base_bytes == shape.base_bytes("float32", ranks)
    assert spec.kv_bytes_per_token_layer == shape.kv_bytes("float32", ranks)
    if exits:
        head = ExitHead(has_norm=False, mlp_width=64)
        assert spec.exit_head_bytes == {2: shape.exit_head_bytes(head, "float32", ranks)}


@pytest.mark.parametrize("is_random", [False, True])
def test_parts_of_all_ranks_are_the_whole(folders: dict[str, Path], is_random: bool) -> None:
    folder = folders["llama-b"]
    name = f"random:{folder / 'config.json'}" if is_random else folder
    info = inspect_checkpoint(checkpoint_path(name), "float32")
    whole = HostModel(info).flat("layer", 1).views()
    parts = [HostModel(rank_info(info, r, 2)).flat("layer", 1).views() for r in (0, 1)]
    for name, axis in (("out_weight", 0), ("down_weight", 0)):  # [in, out]: cut along what is summed over
        assert torch.equal(torch.cat([p[name] for p in parts], axis), whole[name])
    heads = [HostModel(rank_info(info, r, 2)).flat("base").views()["head"] for r in (0, 1)]
    assert torch.equal(torch.cat(heads)[:VOCAB], HostModel(info).flat("base").views()["head"])
    assert all(len(head) % 64 == 0 for head in heads)


def test_a_load_that_fits_one_rank_only_leaves_none_loaded(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 fails where rank 1 does not: both hold nothing, and serve again after the next load."""

    def full(_action: Load) -> None:
        raise MemoryBudgetError("load.kv_blocks", 1, "full", "Less.")

    monkeypatch.setattr(engine.residency, "load", full)
    with pytest.raises(MemoryBudgetError, match="full"):
        engine.perform(Load(Placement("opt", 6), 40, "test"))
    assert engine.placement is None
    monkeypatch.undo()
    hand = Hand(engine)
    hand.load("opt", 6)
    hand.submit(0, prompts([9])[0], 3)
    assert len(hand.finish()[0]) == 3


@pytest.mark.parametrize("ranks", [0, 3, 16])
def test_a_degree_that_cannot_be_is_refused(folders: dict[str, Path], ranks: int) -> None:
    with pytest.raises(InputError, match="tensor_parallel"):
        TorchEngine({"opt": folders["opt"]}, tensor_parallel=ranks)


def test_more_gpus_than_there_are_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"tensor_parallel: needs 8 GPUs"):
        TorchEngine({"opt": folders["opt"]}, device="cuda:1", tensor_parallel=8)


def test_the_watch_aborts_when_a_rank_ends_or_takes_too_long() -> None:
    """What a GPU rank needs, on stand-ins for workers."""
    for is_late in (False, True):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        aborted = threading.Event()
        team = SimpleNamespace(timeout_s=0.1 if is_late else 60.0, workers=[SimpleNamespace(process=process)])
        watch = Watch(team, aborted.set, every_s=0.02)  # type: ignore[arg-type]
        watch.begin()
        assert is_late or not aborted.wait(0.1)
        if not is_late:
            process.kill()
        assert aborted.wait(5.0)
        assert process.wait(5.0) == -signal.SIGKILL
        watch.close()


def test_a_dead_rank_is_one_clear_error(pair: TorchEngine, folders: dict[str, Path]) -> None:
    """The engine is gone behind it; what follows makes its own."""
    pair.reset()
    assert isinstance(pair, ParallelEngine)
    hand = Hand(pair)
    hand.load("opt", 6)
    hand.submit(0, prompts([9])[0], 30)
    hand.step()
    os.kill(pair.team.workers[0].process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(LostRankError, match="rank 1 is lost: its process ended with code -9"):
        hand.finish()
    assert time.monotonic() - began < 10
    with pytest.raises(HelioSimError, match="closed"):
        pair.perform(Load(Placement("opt", 6), 40, "test"))
    pair.close()
    pair.close()
    # the process can be a rank of another group afterwards
    again = TorchEngine({"opt": folders["opt"]}, tensor_parallel=2)
    workers = [w.process for w in again.team.workers]  # type: ignore[attr-defined]
    again.close()
    assert [w.returncode for w in workers] == [0]


def test_strides_on_two_ranks(folders: dict[str, Path]) -> None:
    """The fast engine: several steps at once, each rank going on by itself."""
    texts = []
    for ranks in (1, 2):
        engine = TorchEngine({"llama": folders["llama"]}, mode="fast", tensor_parallel=ranks)
        placement = Placement("llama", 6)
        engine.perform(Load(placement, 40, "test"))
        asked = dict(enumerate(prompts([9, 20, 3])))
        for request, prompt in asked.items():
            engine.accept(Arrival(Request(request, 0.0, len(prompt), 13), Content("", tuple(prompt), 13)))
        lengths = tuple(len(prompt) for prompt in asked.values())
        engine.perform(Run(placement, NONE, Batch((0, 1, 2), (0, 0, 0), lengths, (True,) * 3)))
        batch = Batch((0, 1, 2), lengths, (1,) * 3, (True,) * 3)
        outcome = engine.perform(Run(placement, NONE, batch, max_steps=12, max_ends=None, in_stride=True))
        assert outcome.stride is not None
        assert len(outcome.stride) == 12
        texts.append(engine.take_outputs())
        engine.close()
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0].values()] == [13, 13, 13]


def test_a_rank_that_hangs_is_given_up(folders: dict[str, Path]) -> None:
    engine = TorchEngine({"opt": folders["opt"]}, tensor_parallel=2, timeout_s=4.0)
    assert isinstance(engine, ParallelEngine)
    hand = Hand(engine)
    hand.load("opt", 2)
    hand.submit(0, prompts([9])[0], 30)
    hand.step()
    process = engine.team.workers[0].process
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(LostRankError, match=r"rank 1 is lost: no answer within 4 s"):
        hand.finish()
    assert time.monotonic() - began < 20
    assert process.returncode == -signal.SIGKILL
    engine.close()


def test_workers_end_with_the_process_that_started_them(folders: dict[str, Path]) -> None:
    code = f"""
import os
from heliosim.engines.torch import TorchEngine
engine = TorchEngine({{"opt": {str(folders["opt"])!r}}}, tensor_parallel=2)
print(engine.team.workers[0].process.pid, flush=True)
os._exit(7)
"""
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **path})
    assert done.returncode == 7, done.stderr
    until = time.monotonic() + 10
    while is_running(int(done.stdout)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(int(done.stdout))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]


def test_a_run_ends_by_steps_where_a_clock_would_end_it(pair: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks would not read a clock alike."""
    assert isinstance(pair, ParallelEngine)
    run = Run(Placement("opt", 2), GREEDY, Batch((0,), (9,), (1,), (True,)), max_steps=50, within_s=1.0)
    for step_s, most in ((0.0, 1), (0.1, 10), (5.0, 1), (0.001, 50)):
        monkeypatch.setattr(pair, "_step_s", step_s)
        made = pair._timeless(run)
        assert (made.within_s, made.max_steps) == (None, most)
    assert pair._timeless(replace(run, within_s=None)).max_steps == 50


def test_a_live_run_on_two_ranks_says_what_one_says(tmp_path: Path) -> None:
    """The shipped profile of one rank, its sizes cut in two: same texts, half of the weights on each rank."""
    profile = open_profile("tiny-opt-cpu")
    trace = tmp_path / "w.jsonl"
    write_workload(trace, profile, 4, 0)
    controller = {"kind": "vanilla", "model": "tiny-opt-s"}  # its texts depend on no batch
    scenario = scenario_for("vanilla", controller, profile, workload(trace, 50.0), seed=0)
    scenario = scenario.model_copy(update={"clock": "wall"})
    runs = [run_live(scenario, profile, tensor_parallel=ranks) for ranks in (1, 2)]
    assert runs[0].outputs == runs[1].outputs
    peaks = [max(run.results.steps["weights_bytes"].to_pylist()) for run in runs]
    assert 0.5 < peaks[1] / peaks[0] < 0.6
    assert [run.results.info.deployed["replica"].gpus for run in runs] == [1, 2]
    with pytest.raises(InputError, match="measured on 2 GPUs"):
        ranked(ranked(profile, scenario.models, 2), scenario.models, 4)
