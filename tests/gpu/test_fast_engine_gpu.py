"""The fast engine on a GPU: what no CPU can show. Not run yet: no GPU was at hand when this was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from heliosim.engines.attention.choose import BACKENDS, choose, differs  # noqa: E402
from heliosim.engines.fast.conditional import why_not  # noqa: E402
from heliosim.engines.fast.timing import linearity, step_seconds  # noqa: E402
from heliosim.engines.models.paged import KVShape  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.errors import InputError  # noqa: E402
from heliosim.types import Placement  # noqa: E402
from tests.contracts.test_fast_engine import (  # noqa: E402
    FORMS,
    RULES,
    Steps,
    by_hand,
    decoding,
    folders,
)
from tests.contracts.test_torch_engine import NONE, expected, prompts  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
__all__ = ["folders"]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def exact_products() -> None:
    """Float32 products in float32, as the reference has them."""
    torch.backends.cuda.matmul.allow_tf32 = False


def fast(folders: dict[str, Path], **rest: Any) -> TorchEngine:
    return TorchEngine(folders, device="cuda", mode="fast", **rest)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_tokens_equal_generate(folders: dict[str, Path], name: str, chunk: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    outputs, _, _ = by_hand(fast(folders), name, NONE, chunk)
    for i, prompt in enumerate(prompts([5, 33, 17, 1, 48])):
        assert outputs[i] == expected(model, prompt, 12 + i)


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_exits_are_those_of_the_plain_engine(folders: dict[str, Path], name: str, form: str) -> None:
    plain = by_hand(TorchEngine(folders, device="cuda"), name, RULES[form])
    assert by_hand(fast(folders), name, RULES[form]) == plain


@pytest.mark.parametrize("form", ["deepest", "eager", "eager-copy"])
def test_conditional_nodes_or_a_reason(folders: dict[str, Path], form: str) -> None:
    if reason := why_not(CUDA):
        with pytest.raises(InputError, match=r"conditional"):
            TorchEngine(folders, device="cuda", mode="conditional")
        pytest.skip(reason)
    plain = by_hand(TorchEngine(folders, device="cuda"), "llama", RULES[form])
    assert by_hand(TorchEngine(folders, device="cuda", mode="conditional"), "llama", RULES[form]) == plain


@pytest.mark.parametrize("form", ["none", "full"])
def test_strides_equal_single_steps(folders: dict[str, Path], form: str) -> None:
    strided = Steps(fast(folders), "llama", RULES[form], 64)
    strided.same_as(Steps(TorchEngine(folders, device="cuda"), "llama", RULES[form], 1))
    assert strided.longest > 4


def warm(folders: dict[str, Path], **rest: Any) -> tuple[TorchEngine, Any]:
    """An engine behind its first stride, and a run of the next steps."""
    engine = fast(folders, **rest)
    _, run = decoding(engine, "llama")
    engine.perform(run(max_steps=6))
    again = run(max_steps=6)
    again.batch.ticks += 6
    return engine, again


def test_a_stride_never_waits_for_the_device(folders: dict[str, Path]) -> None:
    engine, again = warm(folders)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = engine.perform(again)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcome.stride is not None
    assert len(outcome.stride) == 6


def test_a_prompt_is_read_without_waiting(folders: dict[str, Path]) -> None:
    """Loads wait; steps must not, those that read prompts included."""
    engine = fast(folders)
    first = Steps(engine, "llama", NONE, 64)
    runner: Any = engine._runner
    perform, seen = runner.run, []
    runner.run = lambda action: _strictly(perform, action, seen)
    Steps(engine, "llama", NONE, 64).same_as(first)
    assert any(seen)


def _strictly(perform: Any, action: Any, seen: list[int]) -> Any:
    seen.append(len(action.batch.chunks))
    torch.cuda.set_sync_debug_mode("error")
    try:
        return perform(action)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_stride_allocates_nothing(folders: dict[str, Path]) -> None:
    engine, again = warm(folders)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    engine.perform(again)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_replayed_graph_says_what_its_step_says(folders: dict[str, Path]) -> None:
    said = []
    for is_eager in (False, True):
        engine, again = warm(folders)
        runner: Any = engine._runner
        assert runner.graphs.captures >= 1
        if is_eager:
            for ready in runner.graphs._ready.values():
                ready.go = ready.step
        outcome = engine.perform(again)
        assert outcome.stride is not None
        said.append((outcome.stride.tokens.ids.tolist(), outcome.stride.tokens.confidences.tolist()))  # type: ignore[union-attr]
    assert said[0][0] == said[1][0]
    assert said[0][1] == pytest.approx(said[1][1], rel=1e-5)


def test_graphs_serve_again_when_a_placement_comes_back(folders: dict[str, Path]) -> None:
    engine = fast(folders)
    runner: Any = engine._runner
    first = by_hand(engine, "llama", NONE)
    captures = runner.graphs.captures
    by_hand(engine, "opt", NONE)
    assert by_hand(engine, "llama", NONE) == first
    assert runner.graphs.captures <= 2 * captures + 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [KVShape(32, 32, 64), KVShape(32, 8, 128)], ids=str)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
def test_every_backend_is_plain_attention(name: str, shape: KVShape, dtype: torch.dtype) -> None:
    make, why = BACKENDS[name]
    if reason := why(CUDA, dtype):
        pytest.skip(reason)
    assert differs(make(), shape, CUDA, dtype) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_finds_something_that_does_not_gather(dtype: torch.dtype) -> None:
    choice = choose("auto", KVShape(32, 8, 128), CUDA, dtype)
    assert not choice.attention.reads_width, choice.passed_over


def test_steps_cost_their_layers(folders: dict[str, Path]) -> None:
    engine = fast(folders)
    seconds = {d: step_seconds(engine, Placement("llama", d), 4, 32, blocks=64) for d in (2, 3, 6)}
    assert linearity(seconds).worst < 0.25, "layers this small are launches; full sizes are held to 0.05 by gpu_check"
