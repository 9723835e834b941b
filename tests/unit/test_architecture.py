"""Architectures: exact counts against published ones, GiB against HELIOS.md section 5, ranks, and bad files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heliosim.errors import InputError, UnknownNameError
from heliosim.hardware.architecture import (
    ExitHead,
    open_architecture,
    parse_architecture,
    read_architecture,
    shipped_architectures,
)

GIB = 2**30

PUBLISHED_PARAMETERS = {
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "opt-350m": 331_196_416,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "codellama-34b": 33_743_970_304,
    "llama3-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}
"""Counts that the loaded models report."""

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED_PARAMETERS.items())
def test_counts_are_those_of_the_models(name: str, count: int) -> None:
    assert open_architecture(name).parameters() == count


@pytest.mark.parametrize(
    ("name", "dtype", "layer_gib", "base_gib"),
    [
        ("opt-1.3b", "fp32", 0.1876, 0.40),
        ("opt-6.7b", "fp32", 0.7502, 0.80),
        ("llama2-7b", "fp16", 0.3770, 0.49),
        ("llama3-8b", "bf16", 0.4063, 1.96),
        ("llama2-13b", "fp16", 0.5908, 0.61),
        ("codellama-34b", "fp16", 1.2891, 0.98),
        ("llama2-70b", "fp16", 1.5938, 0.98),
    ],
)
def test_bytes_are_those_of_the_constants_of_helios(name: str, dtype: str, layer_gib: float, base_gib: float) -> None:
    model = open_architecture(name)
    assert model.layer_bytes(dtype) / GIB == pytest.approx(layer_gib, abs=0.0001)
    assert model.base_bytes(dtype) / GIB == pytest.approx(base_gib, abs=0.005)


def test_weights_saved_by_partial_loading_are_the_paper_s() -> None:
    """HELIOS.md section 4: OPT-1.3B at 6 of 24 and OPT-6.7B at 9 of 32 layers, FP32."""
    for name, depth, saved in (("opt-1.3b", 6, 3.37), ("opt-6.7b", 9, 17.25)):
        model = open_architecture(name)
        found = (model.weights_bytes("fp32") - model.weights_bytes("fp32", depth)) / GIB
        assert found == pytest.approx(saved, rel=0.01)


def test_a_layer_counted_by_hand() -> None:
    model = parse_architecture(SMALL, "small")
    # head_dim 2: q 8x8, k and v 4x8 each, out 8x8, gate and up 12x8 each, down 8x12, two norms of 8
    assert model.layer_parameters() == 64 + 2 * 32 + 64 + 2 * 96 + 96 + 16
    assert model.base_parameters() == 2 * 100 * 8 + 8
    assert model.kv_bytes("fp16") == 2 * 2 * 2 * 2


def test_two_ranks_counted_by_hand() -> None:
    model = parse_architecture(SMALL, "small")
    # 100 tokens are padded to 128; both norms are held whole
    assert model.rank_vocabulary(2) == 64
    assert model.layer_parameters(2) == (64 + 2 * 32 + 64 + 2 * 96 + 96) // 2 + 16
    assert model.base_parameters(2) == 2 * 64 * 8 + 8


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    model = parse_architecture(SMALL, "small")
    assert [model.rank_kv_heads(tp) for tp in (1, 2, 4)] == [2, 1, 1]
    assert model.kv_bytes("bf16", 4) == model.kv_bytes("bf16", 2)
    llama = open_architecture("llama2-70b")
    assert llama.kv_bytes("fp16", 8) * 8 == llama.kv_bytes("fp16")


def test_opt_holds_row_parallel_biases_on_every_rank() -> None:
    model = open_architecture("opt-13b")
    h = 5120
    cut = 12 * h * h + 3 * h + 4 * h  # matrices, QKV and first MLP bias
    whole = h + h + 4 * h  # output and second MLP bias, two norms with bias
    for tp in (1, 2, 4, 8):
        assert model.layer_parameters(tp) == cut // tp + whole


def test_exit_heads_count_their_parts() -> None:
    model = parse_architecture(SMALL, "small")
    assert model.exit_head_parameters(ExitHead()) == 8
    assert model.exit_head_parameters(ExitHead(has_norm=False, mlp_width=16)) == 16 * 8 + 16 + 16 * 8 + 8
    assert model.exit_head_parameters(ExitHead(has_norm=False, has_own_output=True)) == 800


def test_every_shipped_file_can_be_read_and_cut() -> None:
    for name in shipped_architectures():
        model = open_architecture(name)
        for tp in (1, 2, 4):
            assert model.weights_bytes("bf16", tp=tp) >= model.weights_bytes("bf16") // tp


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"config.json: {field}"):
        parse_architecture(SMALL | change, "small")


def test_a_degree_that_cuts_unevenly_is_refused() -> None:
    with pytest.raises(InputError, match="20 heads") as caught:
        open_architecture("sheared-llama-2.7b").weights_bytes("fp16", tp=8)
    assert "1, 2, 4" in caught.value.remedy
    with pytest.raises(InputError, match="out of reach"):
        open_architecture("llama2-7b").weights_bytes("fp16", tp=16)


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    assert open_architecture(folder).name == "mine"
    assert open_architecture(folder / "config.json").layers == 2
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("{")
    for name, problem in (("list.json", "JSON object"), ("text.json", "not JSON"), ("none.json", "cannot be read")):
        with pytest.raises(InputError, match=problem):
            read_architecture(tmp_path / name)
    with pytest.raises(UnknownNameError, match="llama2-7b"):
        open_architecture("llama2-7")
