"""Fit the shipped device files from published tables: what a GPU's kernels, links, power and engine hosts take.

    python scripts/fit_devices.py DATA [--out heliosim/devices]

DATA: a folder with ``aiconfigurator/``, ``vidur/``, ``splitwise/``, ``distserve/``, ``serverlessllm/``,
``optimum_benchmark/`` and ``hardware/`` as downloaded. One point in five (by hash of its key) is held out, the curves
are fitted to the rest and scored on it by region; then they are fitted to all points and written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fit_curves as fits
import fit_hosts
import fit_power

from heliosim.formats.files import write_text
from heliosim.hardware.device import Device, read_device
from heliosim.hardware.kernels import Kernels

SPECS: dict[str, dict[str, Any]] = {
    "A100-80GB": dict(folder="a100_sxm", vidur="a100", memory=80e9, bandwidth=2.039e12, half=312e12, single=19.5e12),
    "H100-80GB": dict(folder="h100_sxm", vidur="h100", memory=80e9, bandwidth=3.35e12, half=989e12, single=67e12),
    "H200-141GB": dict(folder="h200_sxm", vidur="h100", memory=141e9, bandwidth=4.8e12, half=989e12, single=67e12),
}
"""Data-sheet values (SXM boards, dense, without sparsity; float32 outside the tensor cores)."""


def device_values(data: Path, name: str) -> dict[str, Any]:
    """Everything of a device file but the fitted host presets."""
    spec = SPECS[name]
    root = data / "aiconfigurator" / spec["folder"]
    nothing = fits.origin("not fitted yet", "none", "none")
    peaks = {"float32": spec["single"], "float16": spec["half"], "bfloat16": spec["half"]}
    return {
        "schema_version": 1,
        "name": name,
        "memory_bytes": int(spec["memory"]),
        "bytes_per_s": spec["bandwidth"],
        "flops": peaks,
        "data_sheet": fits.origin(
            "NVIDIA data sheets of the SXM boards", "facts", "memory, bandwidth, dense peaks, power limit"
        ),
        "gemm": fits.gemm(root / "gemm/vllm/0.14.0/gemm_perf.parquet", spec["half"], spec["bandwidth"]),
        "gemm_2023": fits.no_stretch(),
        "decode": fits.decode(root / "attention/vllm/0.14.0/generation_attention_perf.parquet"),
        "prefill": fits.prefill(root / "attention/vllm/0.14.0/context_attention_perf.parquet"),
        "elementwise": fits.elementwise(data / "vidur/profiling/compute" / spec["vidur"], name),
        "all_reduce": fits.all_reduce(data, spec["folder"]),
        "hosts": fit_hosts.placeholders(),
        "links": fits.links(data, name),
        "power": {"origin": nothing, "limit_w": 1.0, "idle_w": 0.0, "decode_w": 1.0, "prefill_w": 1.0},
    }


def smaller_a100(values: dict[str, Any]) -> dict[str, Any]:
    """A100-40GB: the same chip with slower memory, so the same efficiencies; seconds bound by memory grow."""
    ratio = 2.039e12 / 1.555e12
    note = (
        "A100-80GB's curves: the same chip. Efficiencies are kept against 1,555 instead of 2,039 GB/s; seconds of "
        "decode attention and element-wise kernels above their shortest are stretched by the ratio of the bandwidths"
    )
    made: dict[str, Any] = json.loads(json.dumps(values))
    made |= {"name": "A100-40GB", "memory_bytes": 40_000_000_000, "bytes_per_s": 1.555e12}
    for part in ("gemm", "decode", "prefill", "elementwise"):
        made[part]["origin"]["derivation"] = note
        made[part]["origin"]["holdout"] = {}
    for table in ("mha", "gqa"):
        seconds = made["decode"][table]["values"]
        floor = min(seconds)
        made["decode"][table]["values"] = [fits.digits(floor + (s - floor) * ratio) for s in seconds]
    for curve in made["elementwise"]["curves"].values():
        floor = min(curve["value"])
        curve["value"] = [fits.digits(floor + (s - floor) * ratio) for s in curve["value"]]
    made["links"]["origin"]["derivation"] = "A100-80GB's: the same host interface"
    return made


def write_device(path: Path, values: dict[str, Any]) -> Device:
    """One line for each list of numbers, so that a file can be read and its diffs too."""
    text = _lines(values, "") + "\n"
    write_text(path, text)
    return read_device(path)


def _lines(value: Any, pad: str) -> str:
    if isinstance(value, dict) and value:
        inner = pad + "  "
        rows = [f"{inner}{json.dumps(str(k))}: {_lines(v, inner)}" for k, v in sorted(value.items(), key=_key)]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"{pad}  {_lines(v, pad + '  ')}" for v in value) + f"\n{pad}]"
    return json.dumps(value, ensure_ascii=False)


def _key(item: tuple[Any, Any]) -> tuple[int, str]:
    return (int(item[0]), "") if str(item[0]).isdigit() else (0, str(item[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("heliosim/devices"))
    given = parser.parse_args()
    made = {name: device_values(given.data, name) for name in SPECS}
    made["A100-40GB"] = smaller_a100(made["A100-80GB"])
    blank = {name: write_device(given.out / f"{name}.json", values) for name, values in made.items()}
    for name, values in made.items():
        of = "A100-80GB" if name.startswith("A100") else "H100-80GB"
        folder = given.data / "vidur/profiling/compute" / SPECS[of]["vidur"]
        values["gemm_2023"] = fits.gemm_2023(folder, Kernels(blank[of], "bfloat16"), name)
        blank[name] = write_device(given.out / f"{name}.json", values)
    hosts = {name: fit_hosts.hosts(given.data, blank["A100-80GB"], blank["H100-80GB"], name) for name in made}
    for name, values in made.items():
        values["hosts"] = hosts[name]
        blank[name] = write_device(given.out / f"{name}.json", values)
    for name, values in made.items():
        values["power"] = fit_power.power(given.data, blank["A100-80GB"], name)
        device = write_device(given.out / f"{name}.json", values)
        print(f"{name}: {(given.out / f'{name}.json').stat().st_size / 1e3:.0f} kB")
        for part, origin in device.origins().items():
            for region, errors in origin.holdout.items():
                print(
                    f"  {part:22} {region:34} n {errors.points:5}  |error| median {errors.median_abs:6.1%}"
                    f"  p90 {errors.p90_abs:6.1%}  signed {errors.mean_signed:+6.1%}"
                )
        print("  watts:", device.power.model_dump(exclude={"origin"}))
        for preset, host in device.hosts.items():
            print(
                f"  host {preset:22} step {1e3 * host.step_s:6.2f} ms  layer {1e6 * host.layer_s:5.0f} us  row "
                f"{1e6 * host.row_s:5.0f} us  prompt {1e3 * host.prompt_s:5.1f} ms  sync {1e6 * host.sync_s:4.1f} us"
                f"  widths {host.activation_widths:g}"
            )


if __name__ == "__main__":
    main()
