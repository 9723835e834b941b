"""Kernel tables of every shape, read strictly, and made into one model's operator times."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from heliosim.cli import app
from heliosim.costs import StepShape
from heliosim.errors import InputError
from heliosim.formats.profile import load_profile
from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.compose import compose_model
from heliosim.hardware.device import open_device
from heliosim.hardware.steps import StepTimes
from heliosim.operators.aiconfigurator import CONTEXT, CUSTOM, GEMM, GENERATION, NCCL, find_tables, read_aiconfigurator
from heliosim.operators.fit import fit_operators
from heliosim.operators.tables import OperatorTables
from heliosim.profile_diff import decode_shape

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "aiconfigurator"
Row = dict[str, Any]


def gemm_ms(m: float, n: float, k: float) -> float:
    """A power law, which log-log reading gives back exactly."""
    return 1e-6 * m**0.5 * n**0.8 * k**0.7


def decode_ms(rows: float, context: float, kv_heads: float) -> float:
    return 1e-3 + 1e-6 * rows * kv_heads * context


GEMMS = [
    {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": gemm_ms(m, n, k)}
    for m, n, k in product((1, 16, 256, 4096), (1024, 16384, 65536), (1024, 65536))
]
WIDTH = {"head_dim": 128, "kv_cache_dtype": "bfloat16"}
DECODES: list[Row] = [
    {"batch_size": b, "num_heads": h, "num_key_value_heads": kv, "step": c - 1, "latency": decode_ms(b, c, kv), **WIDTH}
    for b, c, (h, kv) in product((1, 8, 64), (16, 128, 1024, 4096), ((32, 8), (32, 32), (8, 8)))
]
PREFILLS: list[Row] = [
    {
        "batch_size": b, "isl": n, "num_heads": 32, "num_key_value_heads": kv, "step": s,
        "latency": 1e-6 * b * n * (n + s) * (2 if b > 1 else 1), **WIDTH,
    }
    for b, n, s, kv in product((1, 4), (16, 256, 2048), (0, 512), (8, 32))
]  # fmt: skip
CUSTOMS: list[Row] = [
    {"num_gpus": g, "message_size": 2**e, "backend": name, "latency": ms * g}
    for g, e, (name, ms) in product((2, 4), (10, 20, 30), (("vllm_eager", 9.0), ("vllm_graph", 0.5)))
]
NCCLS: list[Row] = [
    {"op_name": op, "nccl_dtype": "half", "num_gpus": 2, "message_size": 2**e, "latency": ms}
    for e, (op, ms) in product((10, 30), (("all_gather", 70.0), ("all_reduce", 3.0)))
]


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    write(root / "gemm" / "vllm" / "1.0" / GEMM, GEMMS)
    write(root / "attention" / GENERATION, DECODES)
    write(root / "attention" / CONTEXT, PREFILLS)
    return root


def times(model: str = "llama3.1-8b", tp: int = 1) -> StepTimes:
    return StepTimes.of(open_architecture(model), open_device("A100-80GB"), dtype="bf16", tp=tp)


def read(folder: Path, model: str = "llama3.1-8b", tp: int = 1) -> OperatorTables:
    return read_aiconfigurator(find_tables(folder), times(model, tp))


def test_products_are_read_between_those_around_and_added_up(folder: Path) -> None:
    a, tables = open_architecture("llama3.1-8b"), read(folder)
    assert [m for m, _ in tables.layer] == [1, 16, 256, 4096]
    products = 1e-3 * sum(gemm_ms(16, x.n, x.k) for x in a.matrices())
    assert tables.layer[1][1] == pytest.approx(products + times().elementwise(16), rel=1e-9)
    assert a.head_matrix().n == 128_256  # wider than the table: two equal products
    norm = times().kernels.elementwise("norm", 2 * 16 * a.hidden * 2)
    assert tables.head[1][1] == pytest.approx(2e-3 * gemm_ms(16, 64_128, a.hidden) + norm, rel=1e-9)


def test_a_count_of_tokens_without_all_products_around_is_left_out(folder: Path) -> None:
    path = folder / "gemm" / "vllm" / "1.0" / GEMM
    write(path, [r for r in GEMMS if not (r["m"] == 256 and r["n"] == 16384)])
    assert [m for m, _ in read(folder).layer] == [1, 16, 4096]


def test_rows_given_twice_are_averaged(folder: Path) -> None:
    twice = [r | {"latency": f * r["latency"]} for r in DECODES for f in (0.5, 1.5)]
    once = read(folder).attention
    write(folder / "attention" / GENERATION, twice)
    assert [p.seconds for p in read(folder).attention] == pytest.approx([p.seconds for p in once])


def test_attention_of_the_model_s_own_heads(folder: Path) -> None:
    tables = read(folder)
    decode = {(p.rows, p.context): p.seconds for p in tables.attention if p.rows}
    assert len(decode) == 12
    assert decode[8, 1024] == pytest.approx(1e-3 * decode_ms(8, 1024, 8))
    prefill = {(p.chunk, p.before): p.seconds for p in tables.attention if p.chunk}
    assert prefill[256, 512] == pytest.approx(1e-9 * 256 * 768)
    assert len(prefill) == 6
    assert len(tables.assumptions) == 1


def test_attention_of_other_heads_counts_by_kv_groups_and_says_so(folder: Path) -> None:
    """Llama-2-13B has 40 heads, each with a KV head of its own: those of 8 and of 32 tell what a group takes."""
    write(folder / "attention" / CONTEXT, [r | {"num_heads": 40} for r in PREFILLS])
    tables = read(folder, "llama2-13b")
    decode = {(p.rows, p.context): p.seconds for p in tables.attention if p.rows}
    assert decode[64 * 8 / 40, 1024] == pytest.approx(1e-3 * decode_ms(64, 1024, 8))
    assert all(rows >= 1 for rows, _ in decode)
    said = " ".join(tables.assumptions)
    assert "decode attention of 40 heads over 40 KV heads is read by KV groups" in said
    assert "prefill attention is that of 40 heads over other numbers of KV heads" in said


def test_what_has_no_table_is_that_of_the_device_and_said(folder: Path) -> None:
    (folder / "attention" / GENERATION).unlink()
    tables = read(folder)
    point = next(p for p in tables.attention if (p.rows, p.context) == (16, 1024))
    assert point.seconds == pytest.approx(times().decode_attention(16, 1024))
    assert "decode attention has no table: it is that of A100-80GB" in tables.assumptions


@pytest.mark.parametrize(
    ("name", "rows", "seconds"), [(CUSTOM, CUSTOMS, 1e-3), (NCCL, NCCLS, 3e-3)], ids=["custom", "nccl"]
)
def test_all_reduces_are_added(folder: Path, name: str, rows: list[Row], seconds: float) -> None:
    """Two a layer; graphs before eager launches, and reductions alone."""
    write(folder / "attention" / CONTEXT, [r | {"num_heads": 16, "num_key_value_heads": 4} for r in PREFILLS])
    write(folder / "attention" / GENERATION, [r | {"num_heads": 16, "num_key_value_heads": 4} for r in DECODES])
    write(folder / "comm" / name, rows)
    a, k = open_architecture("llama3.1-8b"), times(tp=2)
    products = 1e-3 * sum(gemm_ms(16, x.n, x.k) for x in a.matrices(2))
    layer = read(folder, tp=2).layer[1][1]
    assert layer == pytest.approx(products + k.elementwise(16) + 2 * seconds, rel=1e-9)


def refused(change: Callable[[Path], None], said: str, folder: Path, **model: Any) -> None:
    change(folder)
    with pytest.raises(InputError) as caught:
        read(folder, **model)
    assert said in str(caught.value)


def edited(name: str, rows: list[Row], place: int, **values: Any) -> Callable[[Path], None]:
    """A change of one row of a table."""
    made = [r | values if k == place else r for k, r in enumerate(rows)]

    def change(folder: Path) -> None:
        path = next(folder.rglob(name))
        write(path, made)

    return change


@pytest.mark.parametrize(
    ("name", "rows", "values", "said"),
    [
        (GEMM, GEMMS, {"latency": 0.0}, "row 3 (the first is 0), latency: a time must be positive"),
        (GEMM, GEMMS, {"latency": math.nan}, "row 3 (the first is 0), latency: must be a number"),
        (GEMM, GEMMS, {"m": None}, "row 3 (the first is 0), m: must be a number of 1 or more"),
        (GENERATION, DECODES, {"num_heads": 32, "latency": -1.0}, "row 3 (the first is 0), latency"),
        (CONTEXT, PREFILLS, {"isl": 0, "num_key_value_heads": 8}, "row 3 (the first is 0), isl"),
    ],
)
def test_bad_cells_name_file_row_and_column(folder: Path, name: str, rows: list[Row], values: Row, said: str) -> None:
    refused(edited(name, rows, 3, **values), said, folder)


def test_bad_tables_name_what_they_lack(folder: Path) -> None:
    path = next(folder.rglob(GEMM))
    refused(lambda f: path.write_text("no table"), "is no readable Parquet file", folder)
    refused(
        lambda f: write(path, [{c: v for c, v in r.items() if c != "n"} for r in GEMMS]), "column is missing", folder
    )
    refused(lambda f: write(path, [r | {"gemm_dtype": "fp8"} for r in GEMMS]), "It has: fp8", folder)
    refused(lambda f: write(path, [r for r in GEMMS if r["n"] > 1024]), "lies outside the table", folder, tp=8)
    write(path, GEMMS)
    refused(lambda f: None, "head_dim: no half-precision rows of it; it has: 128", folder, model="opt-1.3b")
    refused(lambda f: None, "are not in the table; heads/KV heads there: 8/8, 32/8, 32/32", folder, model="llama2-70b")
    write(folder / "comm" / CUSTOM, CUSTOMS)
    refused(lambda f: None, "num_gpus: has too few all-reduces; it has: 2, 4", folder, tp=8)
    path.unlink()
    refused(lambda f: None, "the file is missing, here and in every folder below", folder)


def test_several_tables_of_one_name_must_be_told_apart(folder: Path) -> None:
    write(folder / "gemm" / "sglang" / "2.0" / GEMM, GEMMS)
    with pytest.raises(InputError, match=r"is there 2 times: gemm/sglang/2.0, gemm/vllm/1.0"):
        find_tables(folder)
    assert "vllm" in str(find_tables(folder, "vllm/1.0")[GEMM])


def test_the_command_writes_a_profile_that_says_what_stands_in(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    base = ["profile", "import", "aiconfigurator", str(folder), "--model", "llama3.1-8b", "--device", "mine"]
    base += ["--memory-gib", "80", "-o", str(out)]
    done = CliRunner().invoke(app, [*base, "--kernels", "A100-80GB"], catch_exceptions=False)
    assert done.exit_code == 0
    profile = load_profile(out)
    assert profile.origin == "composed, not measured"
    assert profile.facts.derivation is not None
    assert any(
        "activation and additions are those of A100-80GB" in line for line in profile.facts.derivation.assumptions
    )
    assert profile.facts.composition is not None
    assert set(profile.facts.composition.files) >= {GEMM, CONTEXT, GENERATION}
    for options, said in (
        ([], "hold no element-wise kernels"),
        (["--kernels", "A100-80GB", "--all-reduce", "x.csv"], "has no effect on aiconfigurator"),
    ):
        failed = CliRunner().invoke(app, [*base, "--overwrite", *options])
        assert isinstance(failed.exception, InputError)
        assert said in str(failed.exception)


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder ../shared/data is not here")
@pytest.mark.parametrize(("model", "tp"), [("llama3-8b", 1), ("llama2-7b", 1), ("llama2-70b", 4), ("codellama-34b", 2)])
def test_the_public_tables_agree_with_the_shipped_device(model: str, tp: int) -> None:
    """A100's tables as a user's own: steps within 10 % of those composed from the curves fitted to them (which smooth),
    5 % in the median.
    """
    a, k = open_architecture(model), times(model, tp)
    room = 0.9 * k.device.memory_bytes - a.weights_bytes("bf16", tp=tp)
    token_bytes = a.layers * a.kv_bytes("bf16", tp)
    tables = read_aiconfigurator(find_tables(DATA / "a100_sxm", "vllm"), k)
    fit = fit_operators(tables, step_s=1e-3, row_s=0, kv_tokens=int(room / token_bytes), max_context=4096)
    made, cost, errors = compose_model(a, k.device, dtype="bf16", tp=tp), fit.cost(), []
    for rows, context in product((1, 4, 16, 64, 128), (256, 1024, 4096)):
        if rows * context * token_bytes < room:
            seconds = cost.seconds(decode_shape(a.layers, rows, context))
            errors.append(seconds / made.step_seconds(decode_rows=rows, context=context) - 1)
    for n in (256, 1024, 4096):
        seconds = cost.seconds(StepShape(1, n, 0, 0, 1, n * n, a.layers, 1, 1, 0, 0, 0, n, 0))
        errors.append(seconds / made.step_seconds(prompts=[(n, n)]) - 1)
    sizes = sorted(map(abs, errors))
    assert sizes[-1] < 0.10
    assert sizes[len(sizes) // 2] < 0.05
