"""Facts of checkpoint folders, read without torch. Weight files here hold headers and zeros."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.checkpoint import SHIPPED, Rope, checkpoint_path, inspect_checkpoint

GIB = 2**30
Shapes = dict[str, tuple[int, ...]]


def write_weights(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16") -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)  # sparse: sizes of real models cost nothing


def opt_shapes(d: int, ffn: int, layers: int, vocab: int, positions: int, prefix: str = "model.decoder.") -> Shapes:
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (vocab, d),
        f"{prefix}embed_positions.weight": (positions + 2, d),
        f"{prefix}final_layer_norm.weight": (d,),
        f"{prefix}final_layer_norm.bias": (d,),
    }
    for i in range(layers):
        at = f"{prefix}layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{at}{name}.weight": (d, d), f"{at}{name}.bias": (d,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{at}{name}.weight": (d,), f"{at}{name}.bias": (d,)}
        shapes |= {f"{at}fc1.weight": (ffn, d), f"{at}fc1.bias": (ffn,)}
        shapes |= {f"{at}fc2.weight": (d, ffn), f"{at}fc2.bias": (d,)}
    return shapes


def opt_config(d: int, ffn: int, heads: int, layers: int, vocab: int, positions: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": d,
        "word_embed_proj_dim": d,
        "ffn_dim": ffn,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "eos_token_id": 2,
        **rest,
    }


def llama_config(d: int, ffn: int, heads: int, kv: int, layers: int, vocab: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": d,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **rest,
    }


def llama_shapes(d: int, ffn: int, heads: int, kv: int, layers: int, vocab: int, *, is_tied: bool = False) -> Shapes:
    e = d // heads
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not is_tied:
        shapes["lm_head.weight"] = (vocab, d)
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,)}
        shapes |= {f"{at}self_attn.q_proj.weight": (d, d), f"{at}self_attn.o_proj.weight": (d, d)}
        shapes |= {f"{at}self_attn.{x}_proj.weight": (kv * e, d) for x in "kv"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (ffn, d) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (d, ffn)}
    return shapes


SMALL = {"d": 8, "ffn": 16, "layers": 4, "vocab": 32, "positions": 64}


def write_json(file: Path, value: Any) -> None:
    file.write_text(value if isinstance(value, str) else json.dumps(value))


def small_opt(folder: Path, exits: Any = None, *, prefix: str = "model.decoder.", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", opt_config(8, 16, 2, 4, 32, 64, **config))
    write_weights(folder / "model.safetensors", opt_shapes(**SMALL, prefix=prefix))
    if exits is not None:
        write_json(folder / "exits.json", exits)
    return folder


def small_llama(folder: Path, layers: int = 4, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", llama_config(8, 12, 4, 2, layers, 32, **config))
    write_weights(folder / "model.safetensors", llama_shapes(8, 12, 4, 2, layers, 32))
    return folder


def head_shapes(*layers: int, width: int = 20) -> Shapes:
    shapes: Shapes = {}
    for e in layers:
        shapes |= {f"exits.{e}.fc1.weight": (width, 8), f"exits.{e}.fc1.bias": (width,)}
        shapes |= {f"exits.{e}.fc2.weight": (8, width), f"exits.{e}.fc2.bias": (8,)}
    return shapes


HEADS = {"schema_version": 1, "kind": "fixed", "exits": [1, 2, 4], "head_file": "exit_heads.safetensors"}


def test_bytes_of_published_models(tmp_path: Path) -> None:
    """GiB per layer and for embeddings and head, as the paper's models have them (docs: architecture constants)."""
    cases = [
        ("opt", (2048, 8192, 32, 24), 50272, "float32", 0.1876, 0.40),
        ("opt", (4096, 16384, 32, 32), 50272, "float32", 0.7502, 0.80),
        ("llama", (4096, 11008, 32, 32, 32), 32000, "float16", 0.3770, 0.49),
        ("llama", (4096, 14336, 32, 8, 32), 128256, "bfloat16", 0.4063, 1.96),
        ("llama", (8192, 28672, 64, 8, 80), 32000, "float16", 1.5938, 0.98),
    ]
    for i, (architecture, sizes, vocab, dtype, layer_gib, base_gib) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        if architecture == "opt":
            d, ffn, heads, layers = sizes
            write_json(folder / "config.json", opt_config(d, ffn, heads, layers, vocab, 2048))
            write_weights(folder / "model.safetensors", opt_shapes(d, ffn, layers, vocab, 2048))
        else:
            d, ffn, heads, kv, layers = sizes
            write_json(folder / "config.json", llama_config(d, ffn, heads, kv, layers, vocab))
            write_weights(folder / "model.safetensors", llama_shapes(d, ffn, heads, kv, layers, vocab))
        info = inspect_checkpoint(folder, dtype)
        assert info.spec.layer_bytes / GIB == pytest.approx(layer_gib, abs=6e-5)
        assert info.spec.base_bytes / GIB == pytest.approx(base_gib, abs=6e-3)
        assert info.spec.layers == layers


def test_sizes_follow_the_runtime_dtype(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt", HEADS)
    write_weights(folder / "exit_heads.safetensors", head_shapes(1, 2))
    wide, narrow = inspect_checkpoint(folder, "float32"), inspect_checkpoint(folder, "bfloat16", name="other")
    layer = 4 * (8 * 8 + 8) + 2 * (8 + 8) + (16 * 8 + 16) + (8 * 16 + 8)
    base = 32 * 8 + 66 * 8 + 8 + 8
    head = 20 * 8 + 20 + 8 * 20 + 8
    assert wide.spec.layer_bytes == 4 * layer
    assert wide.spec.base_bytes == 4 * base
    assert wide.spec.exit_head_bytes == {1: 4 * head, 2: 4 * head}
    assert wide.spec.weights_bytes(2) == 4 * (base + 2 * layer + 2 * head)
    assert wide.spec.kv_bytes_per_token_layer == 4 * 2 * 8
    assert wide.spec.hidden_bytes == 4 * 8
    assert narrow.spec.weights_bytes(4) * 2 == wide.spec.weights_bytes(4)
    assert (wide.spec.name, narrow.spec.name) == ("opt", "other")
    assert wide.eos_ids == (2,)
    assert wide.spec.max_context == 64


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
def test_prefixes_of_tensor_names(tmp_path: Path, prefix: str) -> None:
    info = inspect_checkpoint(small_opt(tmp_path / "opt", prefix=prefix), "float32")
    assert info.base_parts()[0].sources == (f"{prefix}embed_tokens.weight",)


def test_shards(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt")
    whole = inspect_checkpoint(folder, "float32")
    shapes = opt_shapes(**SMALL)
    names = list(shapes)
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, kept in parts.items():
        write_weights(folder / file, {name: shapes[name] for name in kept}, "F32")
    index = {"weight_map": {name: file for file, kept in parts.items() for name in kept}}
    write_json(folder / "model.safetensors.index.json", index)
    assert inspect_checkpoint(folder, "float32").spec == whole.spec
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2\.safetensors: no such file"):
        inspect_checkpoint(folder, "float32")


def test_grouped_queries_and_untied_head(tmp_path: Path) -> None:
    info = inspect_checkpoint(small_llama(tmp_path / "llama"), "float32")
    assert (info.heads, info.kv_heads, info.head_dim) == (4, 2, 2)
    assert info.spec.kv_bytes_per_token_layer == 4 * 2 * 2 * 2
    assert info.spec.base_bytes == 4 * (32 * 8 * 2 + 8)
    assert info.spec.layer_bytes == 4 * (8 + 8 + 64 + 64 + 2 * 32 + 3 * 96)


# --- exits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "exits"), [(3, (1, 2, 3)), (4, (1, 2, 3, 4)), (10, (2, 4, 6, 8, 10)), (9, (2, 4, 6, 8, 9))]
)
def test_llama_without_exits_file_exits_anywhere(tmp_path: Path, layers: int, exits: tuple[int, ...]) -> None:
    spec = inspect_checkpoint(small_llama(tmp_path / "llama", layers), "float32").spec
    assert (spec.kind, spec.exits, spec.exit_head_bytes) == ("anywhere", exits, {})


def test_opt_without_exits_file_has_only_its_last_layer(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt")
    spec = inspect_checkpoint(folder, "float32").spec
    assert (spec.kind, spec.exits) == ("fixed", (4,))
    spec = inspect_checkpoint(folder, "float32", exits=[1, 3]).spec
    assert (spec.kind, spec.exits) == ("anywhere", (1, 3, 4))


def test_exits_can_be_overridden_where_heads_allow(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt", HEADS)
    write_weights(folder / "exit_heads.safetensors", head_shapes(1, 2))
    info = inspect_checkpoint(folder, "float32", exits=(2,))
    assert info.spec.exits == (2, 4)
    assert list(info.spec.exit_head_bytes) == [2]
    assert len(info.head_parts(2)) == 4
    assert info.head_parts(4) == ()
    with pytest.raises(InputError, match="no trained head for exit 3"):
        inspect_checkpoint(folder, "float32", exits=(3,))


@pytest.mark.parametrize(
    ("exits", "problem"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        ({**HEADS, "schema_version": 2}, "schema_version: must be 1"),
        ({**HEADS, "kind": "sometimes"}, "kind: must be 'fixed' or 'anywhere'"),
        ({**HEADS, "extra": 1}, "extra: unknown field"),
        ({**HEADS, "exits": [2, 1]}, "exits: must be ascending"),
        ({**HEADS, "exits": [1, 1]}, "exits: must be ascending"),
        ({**HEADS, "exits": [1, 5]}, "is no layer of a model with 4"),
        ({**HEADS, "exits": [0, 4]}, "is no layer of a model with 4"),
        ({**HEADS, "exits": ["2"]}, "is no layer of a model with 4"),
        ({**HEADS, "exits": []}, "must be a list of layers"),
        ({**HEADS, "exits": None}, "must be a list of layers"),
        ({**HEADS, "head_file": None}, "fixed exits need trained heads"),
        ({**HEADS, "head_file": "gone.safetensors"}, "head_file: no such file"),
        ({**HEADS, "head_file": 3}, "must be a file name or null"),
        ({**HEADS, "kind": "anywhere"}, "exits anywhere use the model's own head"),
        (HEADS, "no trained head for exit 2"),
    ],
)
def test_broken_exits_files(tmp_path: Path, exits: Any, problem: str) -> None:
    folder = small_opt(tmp_path / "opt", exits)
    write_weights(folder / "exit_heads.safetensors", head_shapes(1))
    with pytest.raises(InputError, match=problem):
        inspect_checkpoint(folder, "float32")


def test_head_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt", HEADS)
    shapes = head_shapes(1, 2) | {"exits.2.fc2.bias": (9,)}
    write_weights(folder / "exit_heads.safetensors", shapes)
    with pytest.raises(InputError, match=r"exits\.2\.fc2\.bias"):
        inspect_checkpoint(folder, "float32")


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type: unsupported architecture"),
        ({"model_type": None}, "model_type: is missing"),
        ({"do_layer_norm_before": False}, "do_layer_norm_before: post-norm"),
        ({"word_embed_proj_dim": 4}, "word_embed_proj_dim: must equal hidden_size 8"),
        ({"enable_bias": False}, "enable_bias"),
        ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ({"activation_function": "tanh"}, "activation_function: unsupported activation"),
        ({"hidden_size": "8"}, "hidden_size: must be int"),
        ({"hidden_size": 0}, "hidden_size: must be positive"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ({"num_attention_heads": 3}, "num_attention_heads: must divide"),
        ({"num_hidden_layers": 5}, "missing tensor"),
        ({"ffn_dim": 17}, "should have 17 rows"),
        ({"tie_word_embeddings": False}, "missing tensor"),
        ({"vocab_size": 33}, "should have 33 rows"),
    ],
)
def test_unusable_opt(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    folder = small_opt(tmp_path / "opt", **config)
    with pytest.raises(InputError, match=problem) as caught:
        inspect_checkpoint(folder, "float32")
    assert "opt" in caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling: unsupported rope type"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor: is missing"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, "rope_parameters: unsupported rope type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: rotates a part"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor: rotates a part"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_unusable_llama(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        inspect_checkpoint(small_llama(tmp_path / "llama", **config), "float32")


def test_rope_in_old_and_new_spelling(tmp_path: Path) -> None:
    old = small_llama(tmp_path / "old", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4})
    new = small_llama(tmp_path / "new", rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0})
    plain = small_llama(tmp_path / "plain")
    assert (
        inspect_checkpoint(old, "float32").rope == inspect_checkpoint(new, "float32").rope == Rope(5e5, "linear", 4.0)
    )
    assert inspect_checkpoint(plain, "float32").rope == Rope(10000.0)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        inspect_checkpoint(tmp_path / "gone", "float32")
    folder = tmp_path / "opt"
    folder.mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        inspect_checkpoint(folder, "float32")
    write_json(folder / "config.json", "{")
    with pytest.raises(InputError, match="is not JSON"):
        inspect_checkpoint(folder, "float32")
    write_json(folder / "config.json", opt_config(8, 16, 2, 4, 32, 64))
    with pytest.raises(InputError, match="no safetensors weights"):
        inspect_checkpoint(folder, "float32")
    for content in (
        b"",
        b"short",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 8) + b'{"a": 1}',
    ):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="safetensors"):
            inspect_checkpoint(folder, "float32")
    write_weights(folder / "model.safetensors", opt_shapes(**SMALL))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-2])
    with pytest.raises(InputError, match="cut short"):
        inspect_checkpoint(folder, "float32")
    write_weights(folder / "model.safetensors", opt_shapes(**SMALL), "I8")
    with pytest.raises(InputError, match="unsupported dtype"):
        inspect_checkpoint(folder, "float32")
    with pytest.raises(UnknownNameError, match="float32"):
        inspect_checkpoint(folder, "float31")


# --- names, fingerprints ----------------------------------------------------------------------------------------------


def test_vocabulary_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    a, b, c, d = (small_opt(tmp_path / name) for name in "abcd")
    tokenizer = {"model": {"vocab": {"a": 0}, "merges": []}, "added_tokens": [], "truncation": None}
    write_json(a / "tokenizer.json", tokenizer)
    write_json(b / "tokenizer.json", tokenizer | {"truncation": {"max_length": 4}})
    write_json(c / "tokenizer.json", tokenizer | {"model": {"vocab": {"b": 0}, "merges": []}})
    prints = [inspect_checkpoint(folder, "float32").spec.vocabulary for folder in (a, b, c, d)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0].startswith("tokenizer:")
    assert prints[3] == "size:32"
    write_json(d / "vocab.json", {"a": 0})
    write_json(d / "merges.txt", "a b")
    assert inspect_checkpoint(d, "float32").spec.vocabulary.startswith("tokenizer:")


def test_generation_config_says_what_ends_a_text(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt")
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 4]})
    assert inspect_checkpoint(folder, "float32").eos_ids == (3, 4)


def test_weights_hash_covers_every_weight_file(tmp_path: Path) -> None:
    folder = small_opt(tmp_path / "opt")
    data = (folder / "model.safetensors").read_bytes()
    assert inspect_checkpoint(folder, "float32").weights_sha256() == hashlib.sha256(data).hexdigest()
    write_json(folder / "exits.json", HEADS)
    write_weights(folder / "exit_heads.safetensors", head_shapes(1, 2))
    heads = (folder / "exit_heads.safetensors").read_bytes()
    assert inspect_checkpoint(folder, "bfloat16").weights_sha256() == hashlib.sha256(heads + data).hexdigest()


def test_checkpoint_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_path(tmp_path) == tmp_path
    assert checkpoint_path("some/where") == Path("some/where")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert checkpoint_path("here") == Path("here")
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny-opt-s'") as caught:
        checkpoint_path("tiny-opts")
    assert caught.value.known == sorted(SHIPPED)


def test_shipped_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "heliosim.formats.checkpoint.__file__", str(tmp_path / "heliosim" / "formats" / "checkpoint.py")
    )
    with pytest.raises(InputError, match="not part of this installation"):
        checkpoint_path("tiny-opt-s")
    folder = tmp_path / "heliosim" / "checkpoints" / "tiny-opt-s"
    folder.mkdir(parents=True)
    assert checkpoint_path("tiny-opt-s") == folder


def test_reading_facts_needs_no_torch() -> None:
    code = "import sys, heliosim.formats.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
