"""Device files: strict, with origins; curves and grids read between their points as they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from heliosim.errors import InputError, UnknownNameError
from heliosim.hardware.device import Curve, Grid, open_device, read_device, shipped_devices
from heliosim.hardware.kernels import Kernels, on_curve, on_grid


def raw() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(shipped_devices()["A100-80GB"].read_text(encoding="utf-8"))
    return values


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_shipped_devices_say_where_everything_comes_from() -> None:
    assert {"A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB"} <= set(shipped_devices())
    for name in shipped_devices():
        device = open_device(name)
        assert device.name == name
        for origin in device.origins().values():
            assert all((origin.source, origin.licence, origin.fitted_range))


def test_names_are_found_in_any_case_and_unknown_ones_are_told() -> None:
    assert open_device("a100-80gb").name == "A100-80GB"
    with pytest.raises(UnknownNameError, match="A100-80GB"):
        open_device("A100-80")
    with pytest.raises(InputError, match="no such device file"):
        open_device("nowhere/device.json")
    with pytest.raises(UnknownNameError, match="graph"):
        open_device("A100-80GB").host("grahp")


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    assert read_device(written(tmp_path, raw() | {"name": "mine"})).name == "mine"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"colour": "green"}, "colour"),
        ({"memory_bytes": 0}, "memory_bytes"),
        ({"flops": {"float32": 1.0}}, "flops"),
        ({"hosts": {}}, "hosts"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        read_device(written(tmp_path, raw() | change))


def test_a_grid_with_cells_missing_is_refused(tmp_path: Path) -> None:
    values = raw()
    values["gemm"]["efficiency"]["values"] = values["gemm"]["efficiency"]["values"][:-1]
    with pytest.raises(InputError, match="cells"):
        read_device(written(tmp_path, values))


def test_numbers_must_be_finite_and_every_host_needs_its_all_reduce(tmp_path: Path) -> None:
    def refused(path: tuple[str | int, ...], value: Any, problem: str) -> None:
        values: Any = raw()
        part = values
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        with pytest.raises(InputError, match=problem):
            read_device(written(tmp_path, values))

    refused(("flops", "float16"), math.nan, "flops.float16")
    refused(("bytes_per_s",), math.inf, "bytes_per_s")
    refused(("gemm", "efficiency", "values", 3), math.nan, "gemm.efficiency.values")
    refused(("all_reduce", "nccl", "gpus"), {}, "all_reduce.nccl.gpus")
    refused(("all_reduce",), {"nccl": raw()["all_reduce"]["nccl"]}, "uses the all-reduce custom, which is missing")


def test_a_curve_is_read_in_logarithms_level_below_and_proportional_beyond() -> None:
    curve = Curve(at=(1.0, 100.0), value=(2.0, 8.0))
    assert on_curve(curve, 10) == pytest.approx(4.0)
    assert on_curve(curve, 0.1) == pytest.approx(2.0)
    assert on_curve(curve, 300) == pytest.approx(24.0)


def test_a_grid_is_read_between_its_corners() -> None:
    axes = [{"name": "a", "points": (1, 4)}, {"name": "b", "points": (10, 30)}]
    grid = Grid.model_validate({"axes": axes, "values": (1.0, 3.0, 4.0, 12.0)})
    # a in logarithms, b plainly: halfway along a is the geometric mean, a quarter along b the weighted one
    assert on_grid(grid, (2, 10), logs=(True, False), values=True) == pytest.approx(2.0)
    assert on_grid(grid, (2, 15), logs=(True, False), values=True) == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert on_grid(grid, (8, 10), logs=(True, False), values=True) == pytest.approx(8.0)
    assert on_grid(grid, (8, 10), logs=(True, False), values=False) == pytest.approx(4.0)


def test_a_product_takes_its_roofline_over_its_efficiency() -> None:
    device = open_device("A100-80GB")
    kernels = Kernels(device, "bfloat16")
    axes, values = device.gemm.efficiency.axes, device.gemm.efficiency.values
    m, n, k = (len(a.points) // 2 for a in axes)
    at = tuple(int(a.points[i]) for a, i in zip(axes, (m, n, k), strict=True))
    efficiency = values[(m * len(axes[1].points) + n) * len(axes[2].points) + k]
    arithmetic, moved = 2 * at[0] * at[1] * at[2], 2 * (at[1] * at[2] + at[0] * (at[1] + at[2]))
    roofline = max(arithmetic / 312e12, moved / 2.039e12)
    assert kernels.gemm(*at) == pytest.approx(roofline / efficiency)


def test_a_head_wider_than_the_table_is_several_products() -> None:
    kernels = Kernels(open_device("A100-80GB"), "bfloat16")
    assert kernels.gemm(16, 128_256, 4096) == pytest.approx(2 * kernels.gemm(16, 64_128, 4096))


def test_float32_is_bound_by_its_own_roofline() -> None:
    """Twice the bytes for a vector, and 16 times the arithmetic time for many tokens: 312 over 19.5 TFLOP/s."""
    device = open_device("A100-80GB")
    half, single = Kernels(device, "float16"), Kernels(device, "float32")
    assert single.gemm(1, 4096, 4096) / half.gemm(1, 4096, 8192) == pytest.approx(1, rel=0.2)
    assert single.gemm(8192, 4096, 4096) / half.gemm(8192, 4096, 4096) == pytest.approx(16, rel=0.25)


def test_the_smaller_a100_is_slower_where_memory_binds() -> None:
    small, large = (Kernels(open_device(name), "float16") for name in ("A100-40GB", "A100-80GB"))
    ratio = 2039 / 1555
    assert small.gemm(1, 4096, 4096) / large.gemm(1, 4096, 4096) == pytest.approx(ratio)
    assert small.gemm(8192, 4096, 4096) == pytest.approx(large.gemm(8192, 4096, 4096))
    long = [k.decode_attention(64, 4096, 32, 32, 128) for k in (small, large)]
    assert long[0] / long[1] == pytest.approx(ratio, rel=0.02)


def test_attention_over_narrow_heads_counts_as_that_of_as_many_bytes() -> None:
    kernels = Kernels(open_device("A100-80GB"), "float16")
    assert kernels.decode_attention(8, 1024, 32, 32, 64) == pytest.approx(
        kernels.decode_attention(8, 1024, 16, 16, 128)
    )
    assert kernels.decode_attention(8, 1024, 32, 8, 128) < kernels.decode_attention(8, 1024, 32, 32, 128)


def test_all_reduces_cost_nothing_alone_and_more_with_more_bytes() -> None:
    kernels = Kernels(open_device("H100-80GB"), "bfloat16")
    assert kernels.all_reduce("custom", 1, 1e6) == 0
    three = kernels.all_reduce("custom", 3, 1e6)
    two, four = (kernels.all_reduce("custom", gpus, 1e6) for gpus in (2, 4))
    assert three == pytest.approx((two + four) / 2)
    assert kernels.all_reduce("nccl", 4, 1e8) > 10 * kernels.all_reduce("nccl", 4, 1e6)
    assert math.isclose(kernels.all_reduce("custom", 8, 2e9), 2 * kernels.all_reduce("custom", 8, 1e9), rel_tol=0.1)
