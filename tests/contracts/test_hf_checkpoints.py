"""Checkpoint folders as transformers writes them: what is read is what transformers says, what is not says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from heliosim.engines.models.host import HostModel  # noqa: E402
from heliosim.engines.models.score import score  # noqa: E402
from heliosim.errors import InputError  # noqa: E402
from heliosim.formats.checkpoint import inspect_checkpoint  # noqa: E402

LAYERS, HIDDEN, VOCAB = 4, 32, 160
TEXT = list(range(7, 60))
OPT = {"word_embed_proj_dim": HIDDEN, "ffn_dim": 64, "init_std": 0.3}
LLAMA = {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(kind: str, **changes: Any) -> Any:
    common = {
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 96, "bos_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    made = transformers.OPTConfig if kind == "opt" else transformers.LlamaConfig
    return made(**{**common, **(OPT if kind == "opt" else LLAMA), **changes})


def save(folder: Path, made: Any, dtype: str = "float32", shard: str | None = None) -> Path:
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(made).eval().to(getattr(torch, dtype))
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    return folder


def expected(folder: Path, depth: int) -> tuple[list[int], Any]:
    """Likeliest ids and their probabilities by transformers' own model, cut to a depth: its last norm and its head."""
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=depth)
    with torch.inference_mode():
        best = model.eval()(torch.tensor([TEXT])).logits[0, :-1].softmax(-1).max(-1)
    return best.indices.tolist(), best.values.numpy()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", [None, "30KB"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("opt", {}), ("opt", {"tie_word_embeddings": False, "activation_function": "gelu"}),
        ("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False, "head_dim": 16}),
    ],
)  # fmt: skip
def test_a_folder_says_what_transformers_says(
    kind: str, changes: dict[str, Any], shard: str | None, stored: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", config(kind, **changes), stored, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard is not None)
    info = inspect_checkpoint(folder, "float32")
    assert info.is_tied == changes.get("tie_word_embeddings", kind == "opt")
    host = HostModel(info)
    (seen,) = score(host, [TEXT], (LAYERS,))
    ids, probabilities = expected(folder, LAYERS)
    assert seen.ids[0].tolist() == ids
    assert seen.max_probs[0] == pytest.approx(probabilities, abs=1e-5)
    assert len(set(ids)) > 3, "the fixture is degenerate"
    assert host.resident(LAYERS).nbytes == info.spec.weights_bytes(LAYERS)


def test_a_layerskip_llama_exits_behind_any_layer(tmp_path: Path) -> None:
    """Such a checkpoint is a Llama's, trained so that its own norm and head read out every layer."""
    folder = save(tmp_path / "layerskip", config("llama"))
    info = inspect_checkpoint(folder, "float32")
    assert (info.spec.kind, info.spec.exits) == ("anywhere", (1, 2, 3, 4))
    (seen,) = score(HostModel(info), [TEXT], (1, 2, 3, 4))
    for row, depth in enumerate((1, 2, 3, 4)):
        ids, probabilities = expected(folder, depth)
        assert seen.ids[row].tolist() == ids
        assert seen.max_probs[row] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("has_mlp", [True, False])
@pytest.mark.parametrize("has_norm", [True, False])
def test_trained_heads_read_out_their_exit(kind: str, has_mlp: bool, has_norm: bool, tmp_path: Path) -> None:
    """The head's formula written out on transformers' hidden states."""
    folder = save(tmp_path / "model", config(kind))
    heads: dict[str, Any] = {}
    if has_mlp:
        heads |= {"fc1.weight": torch.randn(24, HIDDEN), "fc1.bias": torch.randn(24)}
        heads |= {"fc2.weight": 0.3 * torch.randn(HIDDEN, 24), "fc2.bias": torch.randn(HIDDEN)}
    if has_norm:
        heads["norm.weight"] = 1 + 0.5 * torch.randn(HIDDEN)
        heads |= {"norm.bias": torch.randn(HIDDEN)} if kind == "opt" else {}
    save_file({f"exits.2.{name}": value for name, value in heads.items()}, folder / "h.safetensors")
    exits = {"schema_version": 1, "kind": "fixed", "exits": [2], "head_file": "h.safetensors"}
    (folder / "exits.json").write_text(json.dumps(exits))
    if not heads:
        (folder / "h.safetensors").unlink()
        save_file({"exits.3.norm.weight": torch.ones(HIDDEN)}, folder / "h.safetensors")
        with pytest.raises(InputError, match="no trained head for exit 2"):
            inspect_checkpoint(folder, "float32")
        return
    info = inspect_checkpoint(folder, "float32")
    assert info.spec.exit_head_bytes == {2: 4 * sum(value.numel() for value in heads.values())}
    (seen,) = score(HostModel(info), [TEXT], (2, LAYERS))

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        h = model(torch.tensor([TEXT]), output_hidden_states=True).hidden_states[2][0, :-1]
        if has_mlp:
            inner = torch.nn.functional.gelu(h @ heads["fc1.weight"].T + heads["fc1.bias"])
            h = h + inner @ heads["fc2.weight"].T + heads["fc2.bias"]
        norm = model.model.decoder.final_layer_norm if kind == "opt" else model.model.norm
        if has_norm:
            norm.weight.copy_(heads["norm.weight"])
            if kind == "opt":
                norm.bias.copy_(heads["norm.bias"])
        wanted = model.lm_head(norm(h)).softmax(-1).max(-1)
    assert seen.ids[0].tolist() == wanted.indices.tolist()
    assert seen.max_probs[0] == pytest.approx(wanted.values.numpy(), abs=1e-5)
    assert seen.ids[1].tolist() == expected(folder, LAYERS)[0], "the last layer has a head of its own"


@pytest.mark.parametrize(
    "rope", [{"rope_type": "linear", "factor": 2.0}, {**LLAMA3, "original_max_position_embeddings": 32}]
)
def test_rotary_positions_of_llama_2_and_3(rope: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", config("llama", rope_parameters={"rope_theta": 5000.0, **rope}))
    (seen,) = score(HostModel(inspect_checkpoint(folder, "float32")), [TEXT], (LAYERS,))
    assert seen.ids[0].tolist() == expected(folder, LAYERS)[0]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim: must equal hidden_size 32"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before: post-norm OPT is not supported"),
        ("opt", {"enable_bias": False}, "enable_bias: OPT without biases"),
        ("llama", {"attention_bias": True}, "attention_bias: biased Llama layers"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
            "unsupported rope type",
        ),
    ],
)
def test_what_is_not_supported_is_named(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", config(kind, **changes))
    with pytest.raises(InputError) as caught:
        inspect_checkpoint(folder, "float32")
    assert said in str(caught.value)
    assert "config.json" in str(caught.value)


def test_a_missing_shard_and_other_weight_formats_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", config("opt"), shard="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        inspect_checkpoint(folder, "float32")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors weights"):
        inspect_checkpoint(folder, "float32")
