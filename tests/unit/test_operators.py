"""Operator tables: read strictly, added up, and made into step costs that give them back."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from heliosim.costs import StepShape
from heliosim.errors import InputError
from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.device import open_device
from heliosim.hardware.steps import StepTimes
from heliosim.operators import vidur as vidur_tables
from heliosim.operators.fit import fit_operators
from heliosim.operators.llmservingsim import LAYER, ONCE, read_llmservingsim
from heliosim.operators.tables import AttentionTime, OperatorTables, rising_at_the_end, summed, thinned
from heliosim.operators.vidur import read_vidur
from heliosim.runs import run_simulated
from heliosim.scenario import Scenario

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "llmservingsim"
TRUE = {"rows": 2e-7, "context": 3e-9, "mixed": 2e-9, "prefill_row": 3e-5, "prefill_kv": 7e-11, "decode": 4e-6}


def write(path: Path, header: str, rows: list[tuple[object, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)


def attention_s(chunk: float, before: float, rows: float, context: float) -> float:
    held, t = rows * context, TRUE
    decode = t["decode"] * (rows > 0) + t["rows"] * rows + (t["context"] + t["mixed"] * (chunk > 0)) * held
    return decode + t["prefill_row"] * (chunk > 0) + t["prefill_kv"] * chunk * (before + chunk)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A made-up table: the k-th operator takes k microseconds, and k more for every 8 tokens."""
    dense = [(name, t, (k + 1) * (1 + t / 8)) for k, name in enumerate((*LAYER, *ONCE)) for t in (1, 8, 64, 512)]
    write(tmp_path / "dense.csv", "layer,tokens,time_us", list(dense))
    heads = [(name, n, us + n / 10) for name, us in (("lm_head", 700), ("sampler", 20)) for n in (1, 16, 128)]
    write(tmp_path / "per_sequence.csv", "layer,sequences,time_us", list(heads))
    grid = [(c, b, n, k) for c in (0, 64, 256) for b in (0, 256, 1024) for n in (0, 1, 8, 64) for k in (0, 128, 1024)]
    points = [g for g in grid if (g[0] or not g[1]) and (g[2] > 0) == (g[3] > 0) and g[0] + g[2] > 0]
    write(
        tmp_path / "attention.csv",
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us",
        [(*g, 1e6 * attention_s(*g)) for g in points],
    )
    return tmp_path


def test_operators_of_a_layer_are_added_up_as_often_as_they_run(folder: Path) -> None:
    tables = read_llmservingsim(folder)
    often = sum((k + 1) * LAYER[name] for k, name in enumerate(LAYER))
    assert tables.layer[1] == (8.0, pytest.approx(2e-6 * often))
    assert tables.head[0] == (1.0, pytest.approx(720.2e-6))
    assert tables.once[0] == (1.0, pytest.approx((8 + 9) * 1.125e-6))


def test_the_fit_gives_back_the_line_that_made_the_table(folder: Path) -> None:
    fit = fit_operators(read_llmservingsim(folder), step_s=1e-3, row_s=2e-6)
    assert fit.seconds_per["layer_decode_context"] == pytest.approx(TRUE["context"], rel=1e-6)
    assert fit.seconds_per["layer_mixed_context"] == pytest.approx(TRUE["mixed"], rel=1e-6)
    assert fit.seconds_per["layer_prefill_kv"] == pytest.approx(TRUE["prefill_kv"], rel=1e-6)
    assert fit.holdout.p90_abs_error < 1e-9
    assert (fit.max_rows, fit.max_context, fit.max_tokens) == (64, 1280, 512)
    cost, layers = fit.cost(), 2
    shape = StepShape(9, 72, 8, 0, 1, 64 * 320, layers, 1, 9, 0, 0, 0, 320, 8 * 128)
    tables = read_llmservingsim(folder)
    layer = sum((k + 1) * often for k, often in enumerate(LAYER.values())) * 1e-6 * (1 + 72 / 8)
    head, once = 720e-6 + 2 * 0.9e-6, 17e-6 * (1 + 72 / 8)
    expected = 1e-3 + 9 * 2e-6 + layers * (layer + attention_s(64, 256, 8, 128)) + head + once
    assert cost.seconds(shape) == pytest.approx(expected, rel=1e-6)
    assert tables.licence.startswith("MIT")


@pytest.mark.parametrize(
    ("name", "header", "rows", "said"),
    [
        ("dense.csv", "layer,tokens", [("a", 1)], "header: column is missing (value: 'time_us')"),
        ("dense.csv", "layer,tokens,time_us", [("a", 1, 2), ("a", "x", 2)], "row 3, tokens: must be a number"),
        ("dense.csv", "layer,tokens,time_us", [("a", 1, 0)], "row 2, time_us: a time must be positive"),
        ("dense.csv", "layer,tokens,time_us", [("a", 1, "nan")], "row 2, time_us: must be a number"),
        ("dense.csv", "layer,tokens,time_us", [("layernorm", 1, 1)], "operator is missing (value: 'qkv_proj')"),
        ("dense.csv", "layer,tokens,time_us", [], "has no rows"),
    ],
)
def test_bad_tables_name_file_row_and_column(
    folder: Path, name: str, header: str, rows: list[tuple[object, ...]], said: str
) -> None:
    write(folder / name, header, rows)
    with pytest.raises(InputError) as caught:
        read_llmservingsim(folder)
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_table(folder: Path) -> None:
    (folder / "attention.csv").unlink()
    with pytest.raises(InputError, match="the file is missing"):
        read_llmservingsim(folder)


def test_operators_need_counts_in_common() -> None:
    with pytest.raises(InputError, match="fewer than two counts in common"):
        summed({"a": {1: 1.0, 2: 1.0}, "b": {2: 1.0, 3: 1.0}}, {"a": 1, "b": 1}, "x.csv")


def test_a_range_without_points(folder: Path) -> None:
    with pytest.raises(InputError, match="too few attention times"):
        fit_operators(read_llmservingsim(folder), step_s=0, row_s=0, max_context=1)


def test_ends_that_fall_are_left_out() -> None:
    points = ((1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 5.0), (5.0, 4.0), (6.0, 3.0))
    assert rising_at_the_end(points) == points[:4]


@pytest.fixture
def vidur(tmp_path: Path) -> Path:
    """Every operator 1 ms per 64 tokens at one rank (half at two), each row twice, once 0.1 below and once above."""
    folder = tmp_path / "vidur"
    folder.mkdir()
    names = [f"time_stats.{name}.median" for name in (*vidur_tables.LAYER, "emb")]
    header = ",".join(["num_tokens", "num_tensor_parallel_workers", "n_head", "n_embd", *names])
    rows = [
        (t, tp, 32, 4096, *[t / 64 / tp + noise] * len(names))
        for t in (64, 128, 4096)
        for tp in (1, 2)
        for noise in (-0.1, 0.1)
    ]
    write(folder / "mlp.csv", header, list(rows))
    sizes = [(s, 2, d, ms) for s, ms in ((1, 0.5), (8192 * 4096, 2.5)) for d in (1, 2)]
    write(folder / "all_reduce.csv", "size,num_workers,devices_per_node,time_stats.all_reduce.median", list(sizes))
    return folder


def stand_in(tp: int, model: str = "llama2-7b") -> StepTimes:
    return StepTimes.of(open_architecture(model), open_device("A100-80GB"), dtype="fp16", tp=tp)


def test_vidur_rows_of_one_degree_are_averaged_and_added_up(vidur: Path) -> None:
    tables = read_vidur(vidur, stand_in(1))
    ops = sum(vidur_tables.LAYER.values())
    assert tables.layer[:2] == ((64.0, pytest.approx(ops * 1e-3)), (128.0, pytest.approx(ops * 2e-3)))
    assert tables.once[1] == (128.0, pytest.approx(2e-3))
    assert tables.head[0][1] == stand_in(1).head(1)
    assert {bool(a.rows) for a in tables.attention} == {True, False}  # from the device's curves


def test_vidur_ranks_pay_two_all_reduces(vidur: Path) -> None:
    tables = read_vidur(vidur, stand_in(2), vidur / "all_reduce.csv")
    ops = sum(vidur_tables.LAYER.values())
    assert tables.layer[-1] == (4096.0, pytest.approx(ops * 32e-3 + 2 * 2.5e-3))


def test_vidur_attention_of_its_own(vidur: Path) -> None:
    header = "batch_size,prefill_chunk_size,kv_cache_size,is_prefill,num_tensor_parallel_workers"
    header += ",time_stats.attn_prefill.median,time_stats.attn_decode.median,time_stats.attn_kv_cache_save.median"
    rows = [(8, 0, 512, False, 1, "", 0.5, 0.1), (1, 256, 64, True, 1, 0.7, "", 0.1), (8, 0, 512, False, 2, "", 9, 9)]
    write(vidur / "attention.csv", header, list(rows))
    decode, prefill = read_vidur(vidur, stand_in(1)).attention
    assert tuple(decode) == pytest.approx((0, 0, 8, 512, 0.6e-3))
    assert tuple(prefill) == pytest.approx((256, 64, 0, 0, 0.8e-3))


def test_vidur_tables_of_another_model_or_degree(vidur: Path) -> None:
    with pytest.raises(InputError, match=r"mlp.csv, row 2, n_head: is not llama2-70b's, which has 64"):
        read_vidur(vidur, stand_in(1, "llama2-70b"))
    with pytest.raises(InputError, match="num_tensor_parallel_workers: has too few rows"):
        read_vidur(vidur, stand_in(4))
    write(vidur / "one.csv", "size,num_workers,devices_per_node,time_stats.all_reduce.median", [(1, 2, 1, 1.0)])
    with pytest.raises(InputError, match="too few rows within one node"):
        read_vidur(vidur, stand_in(2), vidur / "one.csv")


def test_thinning_keeps_bends() -> None:
    points = [(float(x), 1.0 + max(0, x - 10) / 10) for x in range(1, 31)]
    kept = thinned(points, 1e-9)
    assert kept == ((1.0, 1.0), (10.0, 1.0), (30.0, 3.0))


def test_tables_hold_seconds() -> None:
    tables = OperatorTables(((1, 1.0), (2, 2.0)), ((1, 1.0), (2, 2.0)), ((1, 1.0), (2, 1.0)), (), "s", "MIT")
    assert tables.attention == ()
    assert AttentionTime(1, 2, 3, 4, 5.0).seconds == 5.0


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data is not here")
def test_the_published_pair_is_met() -> None:
    """Acceptance: TTFT within 10 %, TPOT and latency within 5 %, without and with the host preset."""
    import runpy

    script = runpy.run_path(str(ROOT / "scripts" / "validate_llmservingsim.py"))
    found = script["validate"](DATA)
    assert found["requests"] == 300
    for case in found["cases"].values():
        for name, bar in script["BARS"].items():
            assert abs(case["error"][name]["mean"]) <= bar


def test_a_profile_without_exits_serves_vanilla_and_says_so_else(folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from heliosim.cli import app
    from heliosim.profile_view import open_profile

    out = tmp_path / "profile"
    arguments = ["profile", "import", "llmservingsim", str(folder), "--model", "llama3.2-1b", "--device", "mine"]
    done = CliRunner().invoke(app, [*arguments, "--memory-gib", "8", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "composed, not measured" in done.output
    profile = open_profile(str(out))
    assert not profile.has_behaviour
    values = {
        "name": "t",
        "profile": str(out),
        "models": ["llama3.2-1b"],
        "workload": {
            "requests": 5,
            "arrivals": {"kind": "constant", "rate_per_s": 10.0},
            "tasks": [{"task": "", "prompt_tokens": 20, "output_tokens": 6}],
        },
        "memory": {"budget_bytes": "7 GB"},
        "batcher": {"max_batch": 8, "token_budget": 64},
        "controller": {"kind": "vanilla", "model": "llama3.2-1b"},
        "clock": "wall",
    }
    run = run_simulated(Scenario.model_validate(values))
    assert run.info.profile_kind == "composed"
    assert run.requests.num_rows == 5
    asks = values | {"controller": {"kind": "early-exit", "model": "llama3.2-1b"}}
    with pytest.raises(InputError, match="the profile knows no exits"):
        run_simulated(Scenario.model_validate(asks))
