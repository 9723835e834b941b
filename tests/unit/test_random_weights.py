"""Random weights: names, reproducibility, and that a model of them behaves like a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.formats.random_weights import parse_name, split_names

OPT: dict[str, Any] = {
    "model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4,
    "num_hidden_layers": 8, "vocab_size": 2000, "max_position_embeddings": 128, "eos_token_id": 2,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 8, "vocab_size": 2000, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, Path]:
    made = {"opt": tmp_path / "small-opt.json", "llama": tmp_path / "small-llama.json"}
    for kind, values in (("opt", OPT), ("llama", LLAMA)):
        made[kind].write_text(json.dumps(values))
    return made


def info_of(name: str, dtype: str = "float32", **rest: Any) -> Any:
    return inspect_checkpoint(checkpoint_path(name), dtype, **rest)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["random:opt-1.3b@exits=6,12,24,seed=3", "random:opt-1.3b,seed=3,exits=6,12,24"])
def test_a_name_says_exits_and_seed(form: str) -> None:
    asked = parse_name(form)
    assert (asked.name, asked.exits, asked.seed, asked.mlp) == ("opt-1.3b", (6, 12, 24), 3, 0)


def test_commas_separate_names_but_not_options() -> None:
    text = "random:opt-1.3b@exits=6,12,seed=1, random:OPT-6.7b,tiny-opt-s,random:llama3-8b,seed=2"
    assert split_names(text) == [
        "random:opt-1.3b@exits=6,12,seed=1", "random:OPT-6.7b", "tiny-opt-s", "random:llama3-8b,seed=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random:opt-6.7c", "Did you mean 'opt-6.7b'"),
        ("random:opt-6.7b@exit=4", "Did you mean 'exits'"),
        ("random:opt-6.7b@seed=-1", "whole number"),
        ("random:opt-6.7b@seed=1,seed=2", "given twice"),
        ("random:opt-6.7b@exits=4,64", "no layer of a model with 32"),
        ("random:opt-350m", "post-norm OPT is not supported"),
        ("random:llama3-8b@mlp=64", "no heads of their own"),
        ("random:", "names no architecture"),
        ("random:gone/config.json", "no such file"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        info_of(name)
    assert said in str(caught.value)


def test_names_of_shipped_architectures_stay_short_and_others_become_absolute(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(configs["opt"].parent)
    assert str(checkpoint_path("random:OPT-6.7b@seed=2")) == "random:opt-6.7b@seed=2"
    assert str(checkpoint_path("random:./small-opt.json")) == f"random:{configs['opt']}"
    with pytest.raises(UnknownNameError):
        checkpoint_path("random:small-opt")


# --- facts ------------------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_architecture() -> None:
    """Bytes of published shapes, computed by hand from the sizes of config.json."""
    info = info_of("random:llama3-8b@exits=8,16", "bfloat16")
    attention, mlp = 4096 * (4096 + 2 * 1024) + 4096 * 4096, 3 * 4096 * 14336
    assert info.spec.layer_bytes == 2 * (attention + mlp + 2 * 4096)
    assert info.spec.base_bytes == 2 * (2 * 128256 * 4096 + 4096)
    assert (info.spec.exits, info.spec.kind, info.spec.name) == ((8, 16, 32), "anywhere", "llama3-8b")
    opt = info_of("random:opt-1.3b", "float16")
    assert (opt.spec.exits, opt.spec.kind) == ((6, 12, 18, 24), "fixed")
    assert opt.spec.exit_head_bytes == dict.fromkeys((6, 12, 18), 2 * 2 * 2048)
    assert opt.tokenizer_file is None
    assert opt.eos_ids == ()


def test_the_digest_follows_seed_and_exits_but_not_the_dtype() -> None:
    names = ("random:opt-1.3b", "random:opt-1.3b@seed=1", "random:opt-1.3b@exits=12", "random:opt-1.3b@mlp=8")
    assert len({info_of(name).weights_sha256() for name in names}) == len(names)
    assert info_of(names[0]).weights_sha256() == info_of(names[0], "bfloat16").weights_sha256()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_same_name_gives_the_same_weights_and_another_seed_others(configs: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    from heliosim.engines.models.host import HostModel

    name = f"random:{configs['llama']}"
    first, again, other = (HostModel(info_of(n)) for n in (name, name, f"{name}@seed=1"))
    for piece in (("base", 0), ("layer", 0), ("layer", 7)):
        assert torch.equal(first.flat(*piece).data, again.flat(*piece).data)
        assert not torch.equal(first.flat(*piece).data, other.flat(*piece).data)
    assert not torch.equal(first.flat("layer", 0).data, first.flat("layer", 1).data)
    held = again.flat("layer", 5).data.clone()
    again.hold(2)  # what is not held is drawn anew, as if read from disk
    assert torch.equal(again.flat("layer", 5).data, held)


def test_no_two_rows_of_a_matrix_larger_than_the_block_are_alike(configs: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    from heliosim.engines.models import random_parts
    from heliosim.formats.checkpoint import Part

    made = random_parts.random_part(info_of(f"random:{configs['opt']}"), "layer 0", Part("up", (2100, 1024), ()))
    assert made.shape == (2100, 1024)
    rows = made[:, :4]
    assert len(torch.unique(rows, dim=0)) == 2100
    assert float(made.std()) == pytest.approx(1 / 32, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_activations_stay_near_one_and_logits_are_spread(configs: dict[str, Path], kind: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    import numpy as np

    from heliosim.engines.models.host import HostModel
    from heliosim.engines.models.score import score, states

    name = f"random:{configs[kind]}@exits=2,4" + (",mlp=32" if kind == "opt" else "")
    host = HostModel(info_of(name, dtype))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 2000, 100).tolist() for _ in range(4)]
    scored = score(host, texts, (2, 4, 8))
    for i in range(3):
        probs = np.concatenate([s.max_probs[i] for s in scored]).astype(float)
        assert np.isfinite(probs).all()
        assert 0.02 < np.median(probs) < 0.95
        assert probs.std() > 0.05
        assert len(np.unique(np.concatenate([s.ids[i] for s in scored]))) > 40
    with torch.inference_mode():
        _, h, _ = states(host.resident(8), texts, frozenset({8}))[0]
    assert 0.2 < float(h.float().pow(2).mean().sqrt()) < 8


def test_heads_of_random_exits_take_part(configs: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    from heliosim.engines.models.host import HostModel

    resident = HostModel(info_of(f"random:{configs['opt']}@exits=2,mlp=16")).resident(2)
    assert set(resident.heads[2]) == {"up_weight", "up_bias", "down_weight", "down_bias", "norm_weight", "norm_bias"}
    h = torch.randn(3, 64)
    assert not torch.allclose(resident.logits(h, 2), resident.logits(h, 1))
    assert resident.nbytes == resident.host.info.spec.weights_bytes(2)


def test_tokens_equal_those_of_transformers_with_the_same_weights(configs: dict[str, Path]) -> None:
    """The engine's parts of random weights, put into transformers' own model, say the same."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from heliosim.engines.models.host import HostModel
    from heliosim.engines.models.random_parts import random_part
    from heliosim.engines.models.score import score

    info = info_of(f"random:{configs['llama']}")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": False})).eval()
    state = {}
    layers = [(f"layer {i}", part) for i in range(8) for part in replace(info, prefix="model.").layer_parts(i)]
    for piece, part in [*(("base 0", p) for p in replace(info, prefix="model.").base_parts()), *layers]:
        whole = random_part(info, piece, part)
        sizes = [model.state_dict()[source].shape[0] for source in part.sources]
        state |= dict(zip(part.sources, whole.split(sizes), strict=True))
    model.load_state_dict(state)
    text = list(range(100, 160))
    with torch.inference_mode():
        wanted = model(torch.tensor([text])).logits[0, :-1].softmax(-1).max(-1)
    (seen,) = score(HostModel(info), [text], (8,))
    assert seen.ids[0].tolist() == wanted.indices.tolist()
    assert seen.max_probs[0] == pytest.approx(wanted.values.numpy(), abs=1e-4)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_random_weights_calibrate_to_times_and_bytes_without_behaviour(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from heliosim_calibrate.calibrate import Request, calibrate

    from heliosim.engines.torch import TorchEngine
    from heliosim.profile_view import check_profile, show_profile
    from heliosim.runs import run_live
    from tests.profiles import scenario, workload

    configs["llama"].write_text(json.dumps({**LLAMA, "num_hidden_layers": 2}))
    name = f"random:{configs['llama']}@exits=1,seed=5"
    asked = Request(
        models=[name],
        out=tmp_path / "profile",
        max_batch=1,
        max_context=64,
        token_budget=32,
        rounds=1,
        device="cpu",
        hardware="off",
    )
    profile = calibrate(asked)
    assert profile.random_models == ("small-llama",)
    facts = profile.model("small-llama")
    assert (facts.checkpoint, facts.weights_seed, facts.exits) == (name, 5, (1, 2))
    assert not profile.has_behaviour
    assert profile.facts.premises == []
    assert not {p.name for p in profile.folder.iterdir()} & {"behaviour.parquet", "behaviour.html"}
    check_profile(profile)
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert all("step times miss" in line for line in problems), "few steps on a busy machine may fit badly"
    show_profile(profile)
    assert "random weights: small-llama (seed 5)" in capsys.readouterr().out

    small = workload(requests=4, prompt={"kind": "fixed", "tokens": 9}, output={"kind": "fixed", "tokens": 5})
    served = {"models": ("small-llama",), "workload": small, "memory": {"budget_bytes": 4_000_000}}
    live = run_live(scenario(profile, **served, controller={"kind": "vanilla", "model": "small-llama"}), profile)
    assert {len(ids) for ids in live.outputs.values()} == {5}
    helios = scenario(profile, **served, controller={"kind": "helios"})
    with pytest.raises(InputError, match="Its weights are random"):
        run_live(helios, profile)
    with pytest.raises(InputError, match="lie on no disk"):
        TorchEngine({"small-llama": name}, host_bytes=1000)


def test_texts_of_random_weights_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from heliosim_calibrate.calibrate import Request, calibrate

    with pytest.raises(InputError, match="random weights say nothing"):
        calibrate(Request(models=["random:opt-125m"], out=tmp_path / "p", exit_methods=["eager+propagate"]))
    with pytest.raises(InputError, match="two models are called opt-125m"):
        calibrate(Request(models=["random:opt-125m", "random:opt-125m@seed=1"], out=tmp_path / "p"))
    assert list(tmp_path.iterdir()) == []
