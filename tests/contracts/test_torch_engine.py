"""TorchEngine against transformers: same tokens, same logits, and books that match the formulas."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from heliosim.engines.models.host import HostModel  # noqa: E402
from heliosim.engines.models.paged import KVLayer, Pass, Row  # noqa: E402
from heliosim.engines.models.score import score  # noqa: E402
from heliosim.engines.torch import TorchEngine  # noqa: E402
from heliosim.errors import InputError, MemoryBudgetError, UnknownNameError  # noqa: E402
from heliosim.formats.checkpoint import SHIPPED, inspect_checkpoint  # noqa: E402
from heliosim.types import (  # noqa: E402
    TICK,
    Arrival,
    Batch,
    Content,
    ExitRule,
    Load,
    Outcome,
    Placement,
    Request,
    Run,
    blocks_for,
)

VOCAB, POSITIONS = 256, 160
NONE, GREEDY = ExitRule("none"), ExitRule("greedy")
PACKAGE = Path(__file__).resolve().parents[2] / "heliosim" / "checkpoints"

# --- checkpoints with random weights, wide enough that the likeliest token is not always the same ---------------------


def opt_config(layers: int, **changes: Any) -> Any:
    sizes = {"hidden_size": 48, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 48}
    ids = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    common = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "num_hidden_layers": layers}
    return transformers.OPTConfig(**(sizes | ids | common | {"init_std": 0.25} | changes))


def llama_config(layers: int, **changes: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
    ids = {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    common = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "num_hidden_layers": layers}
    rest = {"head_dim": 8, "initializer_range": 0.3, "tie_word_embeddings": True}
    return transformers.LlamaConfig(**(sizes | ids | common | rest | changes))


def save(folder: Path, config: Any, *, seed: int, exits: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:  # zeros and ones would hide a forgotten term
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if exits is not None:
        (folder / "exits.json").write_text(json.dumps({"schema_version": 1} | exits))
    return folder


def save_heads(folder: Path, exits: Sequence[int], hidden: int, width: int) -> None:
    made = {}
    for e in exits:
        made[f"exits.{e}.fc1.weight"] = 0.3 * torch.randn(width, hidden)
        made[f"exits.{e}.fc1.bias"] = 0.3 * torch.randn(width)
        made[f"exits.{e}.fc2.weight"] = 0.3 * torch.randn(hidden, width)
        made[f"exits.{e}.fc2.bias"] = 0.3 * torch.randn(hidden)
    save_file(made, folder / "exit_heads.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    fixed = {"kind": "fixed", "exits": [2, 3, 6], "head_file": "exit_heads.safetensors"}
    anywhere = {"kind": "anywhere", "exits": [2, 3, 6], "head_file": None}
    made = {
        "opt": save(root / "opt", opt_config(6), seed=1, exits=fixed),
        "opt-anywhere": save(root / "opt-anywhere", opt_config(6), seed=2, exits=anywhere),
        "llama": save(root / "llama", llama_config(6), seed=3, exits=anywhere),
        "llama-b": save(root / "llama-b", llama_config(4, tie_word_embeddings=False), seed=4),
    }
    save_heads(made["opt"], [2, 3], 48, 64)
    return made


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> Callable[..., Any]:
    """transformers' own model of a fixture, cut to a depth."""
    cache: dict[tuple[str, int | None], Any] = {}

    def get(name: str, depth: int | None = None) -> Any:
        if (name, depth) not in cache:
            cut = {} if depth is None else {"num_hidden_layers": depth}
            transformers.logging.set_verbosity_error()
            model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32, **cut)
            cache[name, depth] = model.eval()
        return cache[name, depth]

    return get


def expected(model: Any, prompt: Sequence[int], length: int) -> list[int]:
    """Greedy tokens of transformers' ``generate``, end of sequence ignored."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, n).tolist() for n in lengths]


# --- a server of a few lines, planned by hand -------------------------------------------------------------------------


class Hand:
    """Runs requests on an engine in the simplest order, with chunked prefill. ``computed``: tokens in KV by request."""

    def __init__(self, engine: TorchEngine, rule: ExitRule = NONE) -> None:
        self.engine, self.rule = engine, rule
        self.computed: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.outcomes: list[Outcome] = []
        self.exits: dict[int, list[int]] = {}
        self.evicted: list[int] = []

    def load(self, model: str, depth: int, blocks: int = 60, *, stores: bool = False, keep: bool = False) -> None:
        kept = tuple(self.computed.items()) if keep else ()
        if not keep:
            self.evict(*self.computed)
        evicted, self.evicted = tuple(self.evicted), []
        self.engine.perform(Load(Placement(model, depth), blocks, "test", stores, kept, evicted))

    def submit(self, request: int, prompt: Sequence[int], length: int | None, max_tokens: int | None = None) -> None:
        most = max_tokens if max_tokens is not None else length
        assert most is not None
        self.engine.accept(Arrival(Request(request, 0.0, len(prompt), most), Content("", tuple(prompt), length)))
        self.known[request] = len(prompt)
        self.exits[request] = []

    def evict(self, *requests: int) -> None:
        for request in requests:
            self.computed.pop(request, None)
            self.evicted.append(request)

    def step(self, requests: Sequence[int] | None = None, chunk: int = 1000) -> Outcome:
        chosen = [r for r in (self.known if requests is None else requests) if r in self.known]
        starts = [self.computed.get(r, 0) for r in chosen]
        counts = [min(chunk, self.known[r] - s) for r, s in zip(chosen, starts, strict=True)]
        emits = [s + n == self.known[r] for r, s, n in zip(chosen, starts, counts, strict=True)]
        batch = Batch(tuple(chosen), tuple(starts), tuple(counts), tuple(emits))
        evicted, self.evicted = tuple(self.evicted), []
        assert self.engine.placement is not None
        outcome = self.engine.perform(Run(self.engine.placement, self.rule, batch, evicted))
        for request, start, count in zip(chosen, starts, counts, strict=True):
            self.computed[request] = start + count
        tokens = outcome.tokens
        for request, exit_layer, is_last in zip(tokens.requests, tokens.exit_layers, tokens.lasts, strict=True):
            self.known[request] += 1
            self.exits[request].append(exit_layer)
            if is_last:
                del self.known[request], self.computed[request]
        self.outcomes.append(outcome)
        return outcome

    def finish(self, chunk: int = 1000) -> dict[int, list[int]]:
        while self.known:
            self.step(chunk=chunk)
        return self.engine.take_outputs()


@pytest.fixture
def engine(folders: dict[str, Path]) -> TorchEngine:
    return TorchEngine(folders)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama", "llama-b"])
@pytest.mark.parametrize("lengths", [[1], [20], [5, 16, 33, 2, 17]])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_tokens_equal_generate(
    engine: TorchEngine, reference: Callable[..., Any], name: str, lengths: list[int], chunk: int
) -> None:
    hand = Hand(engine)
    hand.load(name, engine.specs[name].layers)
    asked = prompts(lengths)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 12 + i)
    outputs = hand.finish(chunk)
    for i, prompt in enumerate(asked):
        assert outputs[i] == expected(reference(name), prompt, 12 + i)
    assert len({token for ids in outputs.values() for token in ids}) > 3, "the fixture is degenerate"
    assert engine.books()["kv_used_blocks"] == 0


def test_requests_join_a_running_batch(engine: TorchEngine, reference: Callable[..., Any]) -> None:
    asked = prompts([9, 30, 4])
    hand = Hand(engine)
    hand.load("llama", 6)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 15)
        hand.step(chunk=8)
        hand.step(chunk=8)
    outputs = hand.finish(8)
    assert outputs == {i: expected(reference("llama"), p, 15) for i, p in enumerate(asked)}


@pytest.mark.parametrize("name", ["llama", "opt-anywhere"])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_depth_equals_a_cut_model(engine: TorchEngine, reference: Callable[..., Any], name: str, depth: int) -> None:
    hand = Hand(engine, GREEDY)
    hand.load(name, depth)
    asked = prompts([11, 25])
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 10)
    outputs = hand.finish()
    assert outputs == {i: expected(reference(name, depth), p, 10) for i, p in enumerate(asked)}
    assert set(hand.exits[0]) == {depth}
    assert hand.outcomes[-1].layers_run == depth


def adapted_logits(model: Any, folder: Path, ids: Sequence[int], exit_layer: int) -> Any:
    """Logits [t, V] at an exit, from transformers' layers and the exit's head written out."""
    with torch.inference_mode():
        states = model.model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
        h = states[exit_layer][0]
        file = folder / "exit_heads.safetensors"
        if file.is_file():
            from safetensors.torch import load_file

            t = {k.removeprefix(f"exits.{exit_layer}."): v for k, v in load_file(file).items()}
            inner = torch.nn.functional.gelu(h @ t["fc1.weight"].T + t["fc1.bias"])
            h = h + inner @ t["fc2.weight"].T + t["fc2.bias"]
        norm = model.model.decoder.final_layer_norm if hasattr(model.model, "decoder") else model.model.norm
        return model.lm_head(norm(h))


@pytest.mark.parametrize("depth", [2, 3])
def test_fixed_exit_uses_its_trained_head(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], depth: int
) -> None:
    hand = Hand(engine, GREEDY)
    hand.load("opt", depth)
    asked = prompts([11, 25])
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 10)
    outputs = hand.finish()
    for i, prompt in enumerate(asked):
        known = list(prompt)
        for token in outputs[i]:
            logits = adapted_logits(reference("opt"), folders["opt"], known, depth)[-1]
            assert token == int(logits.argmax())
            known.append(token)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_logits_confidence_and_logprob(folders: dict[str, Path], reference: Callable[..., Any], name: str) -> None:
    host = HostModel(inspect_checkpoint(folders[name], "float32"))
    resident = host.resident(6)
    ids = prompts([40])[0]
    with torch.inference_mode():
        run = Pass([Row(range(3), 0, 40)], host.kv_shape, torch.device("cpu"), torch.float32, ids=[ids])
        resident.family.begin(run)
        h = resident.family.embed(resident.base, run.ids, run.positions)
        kv = KVLayer(3, host.kv_shape, torch.device("cpu"), torch.float32)
        for layer in resident.layers:
            h = resident.family.layer(layer, h, run, kv)
        got = resident.logits(h, 6)
        want = reference(name)(torch.tensor([ids])).logits[0]
    assert torch.allclose(got, want, atol=1e-4, rtol=1e-5)

    engine = TorchEngine({name: folders[name]})
    hand = Hand(engine)
    hand.load(name, 6)
    hand.submit(0, ids, 1)
    tokens = hand.step().tokens
    logs = want[-1].log_softmax(-1)
    assert tokens.ids == (int(logs.argmax()),)
    assert tokens.logprobs[0] == pytest.approx(float(logs.max()), abs=1e-4)
    assert tokens.confidences[0] == pytest.approx(float(logs.max().exp()), abs=1e-4)
    assert tokens.lasts == (True,)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500.0,
        },
    ],
    ids=["linear", "llama3"],
)
def test_rope_scaling(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = save(tmp_path / "scaled", llama_config(4, rope_parameters=rope, num_key_value_heads=6), seed=5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hand = Hand(TorchEngine({"scaled": folder}))
    hand.load("scaled", 4)
    prompt = prompts([90])[0]
    hand.submit(0, prompt, 20)
    assert hand.finish(50)[0] == expected(model, prompt, 20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_half_precision_stays_close(folders: dict[str, Path], name: str, dtype: str) -> None:
    ids = prompts([60])
    full = score(HostModel(inspect_checkpoint(folders[name], "float32")), ids, [6])[0]
    host = HostModel(inspect_checkpoint(folders[name], dtype))
    half = score(host, ids, [6])[0]
    assert (full.ids == half.ids).mean() > 0.7
    hand = Hand(TorchEngine({name: folders[name]}, dtype=dtype))
    hand.load(name, 6)
    hand.submit(0, ids[0], 4)
    hand.finish(25)
    assert hand.engine.books()["weights_bytes"] == host.info.spec.weights_bytes(6)


@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_shards_in_half_precision_and_bare_decoders(tmp_path: Path, architecture: str) -> None:
    """Weights in several float16 files, and the decoder saved without its language-model head (tied)."""
    config = opt_config(3) if architecture == "opt" else llama_config(3)
    torch.manual_seed(6)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().half()
    model.save_pretrained(tmp_path / "whole", max_shard_size="50KB")
    assert (tmp_path / "whole" / "model.safetensors.index.json").is_file()
    model.model.save_pretrained(tmp_path / "bare")
    prompt = prompts([20])[0]
    want = expected(model.float(), prompt, 10)
    for folder in ("whole", "bare"):
        hand = Hand(TorchEngine({"m": tmp_path / folder}))
        hand.load("m", 3)
        hand.submit(0, prompt, 10)
        assert hand.finish()[0] == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_tokens_on_a_gpu(folders: dict[str, Path], reference: Callable[..., Any], name: str) -> None:
    engine = TorchEngine(folders, device="cuda")
    hand = Hand(engine)
    hand.load(name, 6)
    asked = prompts([5, 33, 17])
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 12)
    outputs = hand.finish(9)
    assert outputs == {i: expected(reference(name), p, 12) for i, p in enumerate(asked)}
    hand.load(name, 3, stores=True)
    hand.submit(7, asked[0], 6)
    hand.step()
    hand.load(name, 6, 9, stores=True, keep=True)
    assert engine.books()["kv_bytes"] == 9 * engine.specs[name].block_bytes(6)
    assert len(hand.finish()[7]) == 6


# --- placements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first", "then"), [("opt", 2, 6), ("opt", 3, 6), ("llama", 2, 5), ("llama", 6, 2)])
def test_reprefill_after_a_load(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], name: str, first: int, then: int
) -> None:
    """After a change of depth, a request goes on as the new depth would from its text so far."""
    asked = prompts([18, 5])
    hand = Hand(engine, GREEDY)
    hand.load(name, first)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 14)
    for _ in range(6):
        hand.step()
    before = {i: engine.generated(i) for i in range(2)}
    hand.load(name, then)
    outputs = hand.finish(9)
    for i, prompt in enumerate(asked):
        assert outputs[i][:6] == before[i]
        model = reference(name, then if then < 6 else None)
        assert outputs[i][6:] == expected(model, prompt + before[i], 8)


def test_switch_of_model(engine: TorchEngine, reference: Callable[..., Any]) -> None:
    prompt = prompts([21])[0]
    hand = Hand(engine)
    hand.load("opt", 6)
    hand.submit(0, prompt, 20)
    for _ in range(7):
        hand.step()
    hand.load("llama", 6)
    for _ in range(7):
        hand.step()
    hand.load("opt", 6)
    output = hand.finish()[0]
    known = list(prompt)
    for name, count in (("opt", 7), ("llama", 7), ("opt", 6)):
        part = expected(reference(name), known, count)
        assert output[len(known) - 21 :][:count] == part
        known += part


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("blocks", [60, 13, 200])
def test_extend_continues_as_if_always_deep(
    engine: TorchEngine, reference: Callable[..., Any], name: str, blocks: int
) -> None:
    """Layers depend on what lies below them only, so extended KV equals the KV of a deep run over the same text."""
    asked = prompts([18, 5, 40, 1, 70])
    hand = Hand(engine, GREEDY)
    hand.load(name, 2, stores=True)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 20)
        hand.step(chunk=16)
    while any(hand.computed[i] < len(p) for i, p in enumerate(asked)):
        hand.step(chunk=16)
    hand.evict(1, 4)
    early = {i: engine.generated(i) for i in (0, 2, 3)}
    hand.load(name, 3, blocks, stores=True, keep=True)
    assert engine.books()["kv_blocks"] == blocks
    kept = [0, 2, 3]
    for _ in range(3):
        hand.step(kept)
    middle = {i: engine.generated(i) for i in kept}
    hand.load(name, 6, blocks, stores=True, keep=True)
    hand.rule = NONE
    outputs: dict[int, list[int]] = {}
    while any(i in hand.known for i in kept):
        hand.step(kept)
    outputs = engine.take_outputs()
    for i in kept:
        a, b = early[i], middle[i]
        if name == "llama":
            assert outputs[i][len(a) : len(b)] == expected(reference(name, 3), asked[i] + a, 3)
        assert outputs[i][len(b) :] == expected(reference(name), asked[i] + b, 20 - len(b))
    if blocks == 60:
        hand.rule = NONE
        assert set(hand.finish()) == {1, 4}


def test_extend_after_early_stops_uses_the_exit_states(engine: TorchEngine) -> None:
    hand = Hand(engine, ExitRule("threshold", 0.0))
    hand.load("llama", 5, stores=True)
    hand.submit(0, prompts([20])[0], 12)
    for _ in range(6):
        hand.step()
    assert hand.outcomes[-1].layers_run == 2
    hand.load("llama", 6, stores=True, keep=True)
    assert len(hand.finish()[0]) == 12


def test_evicted_request_starts_again(engine: TorchEngine, reference: Callable[..., Any]) -> None:
    asked = prompts([30, 12])
    hand = Hand(engine)
    hand.load("opt", 6, 8)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 25)
    for _ in range(5):
        hand.step()
    hand.evict(0)
    for _ in range(3):
        hand.step([1])
    assert engine.books()["kv_used_blocks"] == blocks_for(12 + 7)
    outputs = hand.finish()
    assert outputs == {i: expected(reference("opt"), p, 25) for i, p in enumerate(asked)}


def test_books_equal_the_formulas(engine: TorchEngine) -> None:
    assert set(engine.books().values()) == {0}
    hand = Hand(engine)
    for name, depth, stores in [
        ("opt", 2, False),
        ("opt", 3, True),
        ("opt", 6, True),
        ("llama", 4, True),
        ("llama", 1, False),
        ("llama-b", 4, False),
        ("opt", 2, True),
    ]:
        hand.load(name, depth, 17, stores=stores)
        spec, books = engine.specs[name], engine.books()
        assert books["weights_bytes"] == spec.weights_bytes(depth)
        assert books["block_bytes"] == spec.block_bytes(depth, stores)
        assert books["kv_bytes"] == 17 * spec.block_bytes(depth, stores)
        assert books["kv_used_blocks"] == 0
    hand.submit(0, prompts([40])[0], 2)
    hand.step()
    assert engine.books()["kv_used_bytes"] == 3 * engine.specs["opt"].block_bytes(2, True)
    hand.load("opt", 6, 9, stores=True, keep=True)
    spec, books = engine.specs["opt"], engine.books()
    assert books["weights_bytes"] == spec.weights_bytes(6)
    assert books["kv_bytes"] == 9 * spec.block_bytes(6)
    assert books["kv_used_blocks"] == 3


# --- early exit -------------------------------------------------------------------------------------------------------


class SlowReference:
    """One request, token by token, with a KV cache of plain lists and the exit rule written out.

    Prompt tokens run all layers; a token that left early leaves the KV of the skipped layers to state propagation.
    """

    def __init__(self, model: Any, folder: Path, exits: Sequence[int], depth: int, threshold: float) -> None:
        self.model, self.folder, self.exits, self.depth, self.threshold = model, folder, exits, depth, threshold
        self.is_opt = hasattr(model.model, "decoder")
        self.layers = model.model.decoder.layers if self.is_opt else model.model.layers
        self.cache = transformers.DynamicCache(config=model.config)

    def generate(self, prompt: Sequence[int], length: int) -> tuple[list[int], list[int]]:
        known, exits = list(prompt), []
        for _ in range(length):
            start = self.cache.get_seq_length(0)
            token, layer = self.forward(known[start:], start)
            known.append(token)
            exits.append(layer)
        return known[len(prompt) :], exits

    def forward(self, ids: Sequence[int], start: int) -> tuple[int, int]:
        with torch.inference_mode():
            positions = torch.arange(start, start + len(ids))[None]
            h, extra = self.embed(torch.tensor([list(ids)]), positions)
            found: tuple[int, int] | None = None
            for i in range(self.depth):
                if found is not None and start > 0:
                    self.propagate(h, i, positions, extra)
                    continue
                mask = self.mask(len(ids), start)
                h = self.layers[i](h, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **extra)
                h = h[0] if isinstance(h, tuple) else h
                if found is None and (i + 1 in self.exits or i + 1 == self.depth):
                    probs = self.head(h[:, -1], i + 1).softmax(-1)[0]
                    if i + 1 == self.depth or float(probs.max()) >= self.threshold:
                        found = int(probs.argmax()), i + 1
            assert found is not None
            return found

    def embed(self, ids: Any, positions: Any) -> tuple[Any, dict[str, Any]]:
        if self.is_opt:
            decoder = self.model.model.decoder
            return decoder.embed_tokens(ids) + decoder.embed_positions(None, 0, position_ids=positions), {}
        h = self.model.model.embed_tokens(ids)
        return h, {"position_embeddings": self.model.model.rotary_emb(h, position_ids=positions)}

    def mask(self, count: int, start: int) -> Any:
        reach = torch.arange(start, start + count)[:, None]
        hides = torch.arange(start + count) > reach
        return torch.zeros(1, 1, count, start + count).masked_fill(hides, float("-inf"))

    def head(self, h: Any, layer: int) -> Any:
        base = self.model.model.decoder if self.is_opt else self.model.model
        file = self.folder / "exit_heads.safetensors"
        if file.is_file() and layer < len(self.layers):
            from safetensors.torch import load_file

            t = {k.removeprefix(f"exits.{layer}."): v for k, v in load_file(file).items()}
            inner = torch.nn.functional.gelu(h @ t["fc1.weight"].float().T + t["fc1.bias"].float())
            h = h + inner @ t["fc2.weight"].float().T + t["fc2.bias"].float()
        return self.model.lm_head(base.final_layer_norm(h) if self.is_opt else base.norm(h))

    def propagate(self, h: Any, i: int, positions: Any, extra: dict[str, Any]) -> None:
        layer = self.layers[i]
        x = layer.self_attn_layer_norm(h) if self.is_opt else layer.input_layernorm(h)
        shape = (1, h.shape[1], -1, layer.self_attn.head_dim)
        k = layer.self_attn.k_proj(x).view(shape).transpose(1, 2)
        v = layer.self_attn.v_proj(x).view(shape).transpose(1, 2)
        if not self.is_opt:
            cos, sin = extra["position_embeddings"]
            half = k.shape[-1] // 2
            k = k * cos[:, None] + torch.cat((-k[..., half:], k[..., :half]), -1) * sin[:, None]
        self.cache.update(k, v, i)


def middle_threshold(host: HostModel, ids: list[list[int]], layer: int) -> float:
    """A threshold about half of the tokens reach at an exit."""
    return float(np.median(np.concatenate([s.max_probs[0] for s in score(host, ids, [layer])])))


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("depth", [3, 6])
def test_threshold_equals_the_slow_reference(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], name: str, depth: int
) -> None:
    prompt = prompts([23])[0]
    threshold = middle_threshold(engine.hosts[name], [prompt], 2)
    slow = SlowReference(reference(name), folders[name], [2, 3], depth, threshold)
    want, exits = slow.generate(prompt, 40)
    hand = Hand(engine, ExitRule("threshold", threshold, "wait-for-deepest"))
    hand.load(name, depth)
    hand.submit(0, prompt, 40)
    assert hand.finish()[0] == want
    assert hand.exits[0] == exits
    assert len(set(exits)) > 1, "the fixture never mixes exits"
    assert [o.layers_run for o in hand.outcomes] == [depth, *exits[1:]]
    for outcome in hand.outcomes:
        if outcome.tokens.exit_layers[0] < depth:
            assert outcome.tokens.confidences[0] >= threshold


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_full_batching_takes_early_tokens_but_runs_every_layer(
    engine: TorchEngine, folders: dict[str, Path], reference: Callable[..., Any], name: str
) -> None:
    asked = prompts([23, 9])
    threshold = middle_threshold(engine.hosts[name], asked, 2)
    hand = Hand(engine, ExitRule("threshold", threshold, "full"))
    hand.load(name, 6)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 12)
    outputs = hand.finish()
    assert {o.layers_run for o in hand.outcomes} == {6}
    for i, prompt in enumerate(asked):
        known = list(prompt)
        for token, exit_layer in zip(outputs[i], hand.exits[i], strict=True):
            slow = SlowReference(reference(name), folders[name], [2, 3], 6, threshold)
            assert slow.forward(known, 0) == (token, exit_layer)
            known.append(token)


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_batch_stops_at_its_deepest_row(engine: TorchEngine, name: str) -> None:
    asked = prompts([23, 9, 14])
    threshold = middle_threshold(engine.hosts[name], asked, 2)
    hand = Hand(engine, ExitRule("threshold", threshold, "wait-for-deepest"))
    hand.load(name, 6)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 20)
    hand.finish()
    assert hand.outcomes[0].layers_run == 6, "prompt tokens need every layer"
    assert all(o.layers_run == max(o.tokens.exit_layers) for o in hand.outcomes[1:])
    assert len({o.layers_run for o in hand.outcomes[1:]}) > 1
    # a joining prompt makes a step run all layers
    hand.submit(7, asked[0], 4)
    hand.step()
    hand.submit(8, asked[1], 4)
    assert hand.step().layers_run == 6


def test_impossible_threshold_equals_vanilla(engine: TorchEngine, reference: Callable[..., Any]) -> None:
    prompt = prompts([12])[0]
    hand = Hand(engine, ExitRule("threshold", 1.1))
    hand.load("opt", 6)
    hand.submit(0, prompt, 10)
    assert hand.finish()[0] == expected(reference("opt"), prompt, 10)
    assert set(hand.exits[0]) == {6}


# --- ends and errors --------------------------------------------------------------------------------------------------


def test_end_of_sequence_and_max_tokens(engine: TorchEngine, reference: Callable[..., Any]) -> None:
    prompt = prompts([12])[0]
    natural = expected(reference("llama"), prompt, 30)
    host = engine.hosts["llama"]
    stop = natural[9]
    hand = Hand(engine)
    hand.load("llama", 6)
    object.__setattr__(host.info, "eos_ids", (stop,))
    hand.submit(0, prompt, None, max_tokens=30)
    hand.submit(1, prompt, None, max_tokens=3)
    hand.submit(2, prompt, 30, max_tokens=30)
    outputs = hand.finish()
    assert outputs[0] == natural[: natural.index(stop) + 1]
    assert outputs[1] == natural[:3]
    assert outputs[2] == natural


def test_outcome_times_are_ticks(engine: TorchEngine) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 4)
    hand.submit(0, [5, 6, 7], 1)
    seconds = hand.step().seconds
    assert seconds > 0
    assert (seconds / TICK).is_integer()


def test_ids_can_be_left_out(folders: dict[str, Path]) -> None:
    hand = Hand(TorchEngine({"opt": folders["opt"]}, record_ids=False))
    hand.load("opt", 2, 4)
    hand.submit(0, [5, 6, 7], 1)
    assert hand.step().tokens.ids is None


def test_forgotten_request_frees_its_blocks(engine: TorchEngine) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 4)
    hand.submit(0, [5, 6, 7], 5)
    hand.step()
    assert engine.books()["kv_used_blocks"] == 1
    engine.forget(0)
    engine.forget(99)
    assert engine.books()["kv_used_blocks"] == 0


def test_running_out_of_blocks_is_a_broken_promise(engine: TorchEngine) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 2)
    hand.submit(0, prompts([40])[0], 5)
    with pytest.raises(AssertionError, match="needs 3 more KV blocks for 40 tokens, but 2 of 2"):
        hand.step()


@pytest.mark.parametrize(
    ("placement", "kept", "error"),
    [
        (Placement("opt", 4), (), InputError),
        (Placement("opt", 0), (), InputError),
        (Placement("llama", 7), (), InputError),
        (Placement("lama", 6), (), UnknownNameError),
        (Placement("opt", 6), ((0, 3),), InputError),
        (Placement("llama", 6), ((0, 3),), InputError),
    ],
)
def test_load_that_cannot_work_changes_nothing(
    engine: TorchEngine, placement: Placement, kept: tuple[tuple[int, int], ...], error: type[Exception]
) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 4)
    hand.submit(0, [5, 6, 7], 5)
    hand.step()
    before = engine.books()
    with pytest.raises(error):
        engine.perform(Load(placement, 4, "test", kept=kept))
    assert engine.books() == before
    hand.step()
    assert len(engine.generated(0)) == 2


def test_load_beyond_memory_is_a_clean_error(engine: TorchEngine) -> None:
    hand = Hand(engine)
    hand.load("opt", 2, 4)
    with pytest.raises(MemoryBudgetError, match=r"opt@6.*nothing is loaded"):
        hand.load("opt", 6, 1 << 40)
    assert engine.placement is None
    assert engine.books()["weights_bytes"] == 0
    hand.load("opt", 2, 4)
    hand.submit(0, [5, 6, 7], 5)
    assert len(hand.finish()[0]) == 5


def test_accept_checks_the_content(engine: TorchEngine) -> None:
    def accept(tokens: int, ids: tuple[int, ...] | None, output: int | None = 3) -> None:
        engine.accept(Arrival(Request(0, 0.0, tokens, 5), Content("", ids, output)))

    for tokens, ids, output, field in [
        (3, None, 3, "prompt_ids"),
        (3, (1, 2), 3, "prompt_ids"),
        (0, (), 3, "prompt_ids"),
        (2, (1, VOCAB), 3, "prompt_ids"),
        (2, (1, -1), 3, "prompt_ids"),
        (2, (1, 2), 0, "output_tokens"),
    ]:
        with pytest.raises(InputError, match=f"request 0: {field}"):
            accept(tokens, ids, output)
    accept(2, (1, 2))


def test_settings_are_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    one = {"opt": folders["opt"]}
    with pytest.raises(UnknownNameError, match="bfloat16"):
        TorchEngine(one, dtype="float8")
    with pytest.raises(InputError, match="unknown device"):
        TorchEngine(one, device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no such device"):
            TorchEngine(one, device="cuda")
    other = save(tmp_path / "other", opt_config(2, vocab_size=300), seed=9)
    with pytest.raises(InputError, match="does not share the vocabulary"):
        TorchEngine(one | {"other": other})


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_scores_equal_transformers(
    folders: dict[str, Path], reference: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heliosim.engines.models.score._LOGITS_AT_ONCE", 7 * VOCAB)
    host = HostModel(inspect_checkpoint(folders[name], "float32"))
    texts = prompts([30, 2, 1, 55, 17])
    scores = score(host, texts, [3, 2, 6], batch=3)
    assert [s.ids.shape for s in scores] == [(3, n) for n in (29, 1, 0, 54, 16)]
    for text, got in zip(texts, scores, strict=True):
        for row, layer in enumerate(got.layers):
            if len(text) < 2:
                continue
            if layer == 6:
                with torch.inference_mode():
                    logits = reference(name)(torch.tensor([text])).logits[0, :-1]
            else:
                logits = adapted_logits(reference(name), folders[name], text, layer)[:-1]
            logs = logits.log_softmax(-1)
            top = logs.exp().topk(2).values
            assert got.ids[row].tolist() == logs.argmax(-1).tolist()
            close = {"atol": 1e-4, "rtol": 1e-4}
            assert np.allclose(got.max_probs[row], top[:, 0], **close)
            assert np.allclose(got.margins[row], top[:, 0] - top[:, 1], **close)
            assert np.allclose(got.entropies[row], -(logs.exp() * logs).sum(-1), **close)
            target = logs[torch.arange(len(text) - 1), torch.tensor(text[1:])]
            assert np.allclose(got.logprobs[row], target, **close)


def test_score_checks_its_input(folders: dict[str, Path]) -> None:
    host = HostModel(inspect_checkpoint(folders["opt"], "float32"))
    with pytest.raises(InputError, match=r"sequences\[1\]"):
        score(host, [[1, 2], [3] * (POSITIONS + 1)], [6])
    with pytest.raises(InputError, match=r"sequences\[0\]"):
        score(host, [[1, VOCAB]], [6])
    with pytest.raises(InputError, match="no exit there"):
        score(host, [[1, 2]], [4])


# --- shipped checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(params=SHIPPED)
def shipped(request: pytest.FixtureRequest) -> str:
    assert (PACKAGE / request.param / "model.safetensors").is_file()
    return str(request.param)


def test_shipped_checkpoint_equals_transformers(shipped: str) -> None:
    engine = TorchEngine({shipped: shipped})
    spec = engine.specs[shipped]
    model = transformers.AutoModelForCausalLM.from_pretrained(PACKAGE / shipped, dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    asked = [rng.integers(5, engine.vocab, n).tolist() for n in (40, 13, 100)]
    hand = Hand(engine)
    hand.load(shipped, spec.layers)
    for i, prompt in enumerate(asked):
        hand.submit(i, prompt, 16)
    outputs = hand.finish(32)
    assert outputs == {i: expected(model, p, 16) for i, p in enumerate(asked)}
    hand.rule = ExitRule("threshold", 0.8)
    hand.submit(9, asked[0], 40)
    slow = SlowReference(model, PACKAGE / shipped, [e for e in spec.exits if e < spec.layers], spec.layers, 0.8)
    want, exits = slow.generate(asked[0], 40)
    assert hand.finish()[9] == want
    assert hand.exits[9] == exits
    for depth in spec.exits:
        hand.load(shipped, depth)
        assert engine.books()["weights_bytes"] == spec.weights_bytes(depth)
