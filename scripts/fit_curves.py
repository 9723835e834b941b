"""Curves of a device file from published tables: read, held out, fitted, scored. Used by ``fit_devices.py``."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from heliosim.hardware.architecture import open_architecture
from heliosim.hardware.device import Curve, Grid
from heliosim.hardware.kernels import Kernels, on_curve, on_grid

AICONFIGURATOR = "https://github.com/ai-dynamo/aiconfigurator/tree/095f58a51c4ca8e61b66ec108d86f223f8d559ce"
VIDUR = "https://github.com/microsoft/vidur/tree/7d47513363ec447a741ac5e47241580b47724fbf"
SPLITWISE = "https://github.com/Mutinifni/splitwise-sim/tree/8f99e7dc9b407f4ce2488d03dd44c0b8b946dab0"
SERVERLESS = "https://github.com/ServerlessLLM/ServerlessLLM/tree/9f50241baa5386e06a9321c51f19a9ef5f964c2b"
M_NODES = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
NK_NODES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


def digits(value: float, count: int = 4) -> float:
    """Rounded to so many significant digits: tables of latencies hold no more."""
    return float(f"{value:.{count}g}")


def is_held_out(*key: object) -> bool:
    return hashlib.blake2b(repr(tuple(map(str, key))).encode(), digest_size=4).digest()[0] % 5 == 0


def origin(source: str, licence: str, fitted_range: str, **more: Any) -> dict[str, Any]:
    return {"source": source, "licence": licence, "fitted_range": fitted_range, **more}


def axes_of(names: Sequence[str], nodes: Sequence[Sequence[float]]) -> Any:
    return [{"name": name, "points": tuple(map(float, points))} for name, points in zip(names, nodes, strict=True)]


def scores(regions: Sequence[str], errors: Any) -> dict[str, Any]:
    """Errors of predictions (predicted / measured - 1) by region."""
    by: dict[str, list[float]] = {}
    for region, error in zip(regions, errors, strict=True):
        by.setdefault(region, []).append(float(error))
    return {
        region: {
            "points": len(found),
            "median_abs": digits(np.median(np.abs(found)), 3),
            "p90_abs": digits(np.percentile(np.abs(found), 90), 3),
            "mean_signed": digits(np.mean(found), 3),
        }
        for region, found in sorted(by.items())
    }


# --- matrix products ----------------------------------------------------------------------------------------


def gemm(path: Path, peak: float, bandwidth: float) -> dict[str, Any]:
    """Efficiency at nodes of m, n, k by least squares of its logarithm (multilinear between the nodes)."""
    table = pd.read_parquet(path)
    table = table[(table.gemm_dtype == "bfloat16") & (table.m <= M_NODES[-1])]
    table = table[table.n.between(NK_NODES[0], NK_NODES[-1]) & table.k.between(NK_NODES[0], NK_NODES[-1])]
    table = table.groupby(["m", "n", "k"], as_index=False).latency.mean()
    m, n, k = (table[c].to_numpy(float) for c in "mnk")
    seconds = 1e-3 * table.latency.to_numpy()
    roofline = np.maximum(2 * m * n * k / peak, 2 * (n * k + m * (n + k)) / bandwidth)
    target = np.log(roofline / seconds)
    held = np.array([is_held_out("gemm", *key) for key in zip(m, n, k, strict=True)])
    axes = [np.log(np.array(nodes, float)) for nodes in (M_NODES, NK_NODES, NK_NODES)]
    x = _hats([np.log(m), np.log(n), np.log(k)], axes)
    first = _solve(x[~held], target[~held], [len(a) for a in axes])
    errors = np.exp(target[held] - x[held] @ first) - 1
    regions = [_gemm_region(*key) for key in zip(m[held], n[held], k[held], strict=True)]
    values = np.exp(_solve(x, target, [len(a) for a in axes]))
    return {
        "origin": origin(
            "aiconfigurator, vLLM 0.14.0 GEMM tables, bfloat16",
            "Apache-2.0 (NVIDIA)",
            f"m 1-{M_NODES[-1]}, n and k {NK_NODES[0]}-{NK_NODES[-1]}",
            url=AICONFIGURATOR,
            points=len(table),
            holdout=scores(regions, errors),
        ),
        "dtype": "bfloat16",
        "efficiency": {
            "axes": axes_of("mnk", (M_NODES, NK_NODES, NK_NODES)),
            "values": [digits(v, 3) for v in values],
        },
    }


def _gemm_region(m: float, n: float, k: float) -> str:
    tokens = "m 1-16" if m <= 16 else "m 17-256" if m <= 256 else "m over 256"
    return f"{tokens}, {'n and k from 1024' if min(n, k) >= 1024 else 'narrower'}"


def _hats(points: list[Any], axes: list[Any]) -> Any:
    """Weights of the nodes around each point, as a sparse matrix."""
    from scipy.sparse import csr_matrix

    count = len(points[0])
    index, weight = np.zeros((count, 1), int), np.ones((count, 1))
    for x, axis in zip(points, axes, strict=True):
        high = np.clip(np.searchsorted(axis, x), 1, len(axis) - 1)
        share = ((x - axis[high - 1]) / (axis[high] - axis[high - 1]))[:, None]
        index = np.concatenate([index * len(axis) + high[:, None] - 1, index * len(axis) + high[:, None]], axis=1)
        weight = np.concatenate([weight * (1 - share), weight * share], axis=1)
    rows = np.repeat(np.arange(count), index.shape[1])
    size = int(np.prod([len(a) for a in axes]))
    return csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(count, size))


def _solve(x: Any, y: Any, sizes: Sequence[int]) -> Any:
    """Least squares with a light pull of each node to its neighbours, for nodes that no point lies near."""
    from scipy.sparse import coo_matrix, vstack
    from scipy.sparse.linalg import lsqr

    rows, columns, values, count = [], [], [], 0
    places = np.arange(int(np.prod(sizes))).reshape(sizes)
    for axis in range(len(sizes)):
        a, b = (np.take(places, r, axis).ravel() for r in (range(sizes[axis] - 1), range(1, sizes[axis])))
        for one, two in zip(a, b, strict=True):
            rows += [count, count]
            columns += [one, two]
            values += [0.03, -0.03]
            count += 1
    pull = coo_matrix((values, (rows, columns)), shape=(count, places.size))
    return lsqr(vstack([x, pull]), np.concatenate([y, np.zeros(count)]), iter_lim=400, atol=1e-8, btol=1e-8)[0]


OPERATORS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
VIDUR_MODELS = {"Llama-2-7b-hf": "llama2-7b", "Llama-2-70b-hf": "llama2-70b", "Meta-Llama-3-8B": "llama3-8b"}
STRETCH_NODES = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


def vidur_products(folder: Path) -> pd.DataFrame:
    """Seconds of a layer's four matrix products by model, ranks and tokens."""
    columns = [f"time_stats.{name}.median" for name in OPERATORS]
    frames = []
    for published, name in VIDUR_MODELS.items():
        path = folder / f"meta-llama/{published}/mlp.csv"
        if path.exists():
            keys = ["num_tensor_parallel_workers", "num_tokens"]
            table = pd.read_csv(path).groupby(keys, as_index=False)[columns].mean()
            total = 1e-3 * table[columns].sum(axis=1)
            frames.append(
                pd.DataFrame({"model": name, "tp": table[keys[0]], "tokens": table[keys[1]], "seconds": total})
            )
    return pd.concat(frames, ignore_index=True)


def no_stretch() -> dict[str, Any]:
    return {"origin": origin("not fitted yet", "none", "none"), "stretch": {"at": (1, 2), "value": (1.0, 1.0)}}


def gemm_2023(folder: Path, kernels: Kernels, name: str) -> dict[str, Any]:
    """How much longer products took with the libraries of Vidur's profiles: one curve over tokens for all shapes."""
    table = vidur_products(folder)
    table = table[table.tokens <= STRETCH_NODES[-1]]
    models = {name: open_architecture(name) for name in VIDUR_MODELS.values()}
    ours = np.array(
        [sum(kernels.gemm(r.tokens, m.n, m.k) for m in models[r.model].matrices(int(r.tp))) for r in table.itertuples()]
    )
    x, y = np.log(table.tokens.to_numpy(float)), np.log(table.seconds.to_numpy() / ours)
    held = np.array([is_held_out("gemm 2023", r.model, r.tp, r.tokens) for r in table.itertuples()])
    nodes = np.log(np.array(STRETCH_NODES, float))
    hats = _hats([x], [nodes])
    errors = np.exp(hats[held] @ _solve(hats[~held], y[~held], [len(nodes)]) - y[held]) - 1
    regions = [f"tokens {'1-512' if t <= 512 else '513-4096'}" for t in table.tokens[held]]
    value = np.exp(_solve(hats, y, [len(nodes)]))
    made = origin(
        "Vidur compute profiles (PyTorch and cuBLAS of 2023), a layer's four products over the same by the gemm curves",
        "MIT (Microsoft)",
        "1-4096 tokens, Llama-2-7B and 70B and (A100) Llama-3-8B, 1-8 ranks",
        url=VIDUR,
        points=len(table),
        holdout=scores(regions, errors),
    )
    if name in ("A100-40GB", "H200-141GB"):
        made |= {"derivation": f"{'A100-80GB' if name == 'A100-40GB' else 'H100-80GB'}'s ratio", "holdout": {}}
    return {"origin": made, "stretch": {"at": STRETCH_NODES, "value": [digits(v, 3) for v in value]}}


# --- attention ----------------------------------------------------------------------------------------------

GROUP_NODES = tuple(2**i for i in range(15))
CONTEXT_NODES = (16, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PROMPT_NODES, HEAD_NODES = (1, 4, 16, 64, 128), (1, 2, 4, 8, 16, 32, 64)
LENGTH_NODES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def decode(path: Path) -> dict[str, Any]:
    """Seconds by KV groups (rows times KV heads) and context: medians over the rows that share both."""
    table = pd.read_parquet(path)
    table = table[(table.kv_cache_dtype == "bfloat16") & (table.step >= 15)].copy()
    table["groups"], table["context"] = table.batch_size * table.num_key_value_heads, table.step + 1
    return _attention(
        table,
        ("groups", "context"),
        (GROUP_NODES, CONTEXT_NODES),
        (True, False),
        "KV groups 1-16384, context 16-131072 (as memory allowed), head dimension 128",
        lambda r: f"{'MHA' if r.is_mha else 'GQA'}, context {'to 1024' if r.context <= 1024 else 'over 1024'}",
    )


def prefill(path: Path) -> dict[str, Any]:
    """Seconds by prompts, query heads and tokens; medians over numbers of KV heads."""
    table = pd.read_parquet(path)
    table = table[table.kv_cache_dtype == "bfloat16"].copy()
    return _attention(
        table,
        ("batch_size", "num_heads", "isl"),
        (PROMPT_NODES, HEAD_NODES, LENGTH_NODES),
        (True, True, True),
        "1-128 prompts, 1-64 heads, 1-16384 tokens (as memory allowed), head dimension 128",
        lambda r: f"{'MHA' if r.is_mha else 'GQA'}, prompts {'to 256' if r.isl <= 256 else 'over 256'} tokens",
    )


def _attention(
    table: pd.DataFrame,
    names: tuple[str, ...],
    nodes: tuple[tuple[int, ...], ...],
    logs: tuple[bool, ...],
    fitted_range: str,
    region: Callable[[Any], str],
) -> dict[str, Any]:
    table["is_mha"] = table.num_heads == table.num_key_value_heads
    keys = [*dict.fromkeys((*names, "batch_size", "num_heads", "num_key_value_heads", "is_mha"))]
    table = table.groupby(keys, as_index=False).latency.mean()
    held = np.array([is_held_out("attention", *row) for row in table[keys].itertuples(index=False)])
    errors, regions, grids = [], [], {}
    for is_mha, kind in ((True, "mha"), (False, "gqa")):
        mine = (table.is_mha == is_mha).to_numpy()
        trained = _tabulate(table[mine & ~held], names, nodes)
        for row in table[mine & held].itertuples():
            at = [float(getattr(row, name)) for name in names]
            if all(low[0] <= x <= low[-1] for x, low in zip(at, nodes, strict=True)):
                errors.append(on_grid(trained, at, logs=logs, values=True) / (1e-3 * row.latency) - 1)
                regions.append(region(row))
        grids[kind] = _tabulate(table[mine], names, nodes).model_dump()
    made = origin(
        "aiconfigurator, vLLM 0.14.0 attention tables, bfloat16",
        "Apache-2.0 (NVIDIA)",
        fitted_range,
        url=AICONFIGURATOR,
        points=len(table),
        holdout=scores(regions, errors),
    )
    return {"origin": made, **grids}


def _tabulate(table: pd.DataFrame, names: tuple[str, ...], nodes: tuple[tuple[int, ...], ...]) -> Grid:
    """Medians at the nodes; a node without a row is filled from its neighbours along each axis, in logarithms."""
    found = table.groupby(list(names)).latency.median()
    values = np.full([len(n) for n in nodes], np.nan)
    for place in itertools.product(*(range(len(n)) for n in nodes)):
        key = tuple(n[i] for n, i in zip(nodes, place, strict=True))
        if key in found.index:
            values[place] = np.log(1e-3 * found.loc[key])
    logs = [np.log(np.array(n, float)) for n in nodes]
    while np.isnan(values).any():
        guesses: dict[tuple[int, ...], float] = {}
        for place in zip(*np.nonzero(np.isnan(values)), strict=True):
            inner = [g for axis in range(len(nodes)) if (g := _inside(values, logs[axis], place, axis)) is not None]
            outer = [g for axis in range(len(nodes)) if (g := _outside(values, logs[axis], place, axis)) is not None]
            if inner or outer:
                guesses[place] = float(np.mean(inner)) if inner else max(outer)
        for place, guess in guesses.items():
            values[place] = guess
    return Grid(axes=axes_of(names, nodes), values=tuple(digits(v) for v in np.exp(values).ravel()))


def _inside(values: Any, axis_logs: Any, place: tuple[int, ...], axis: int) -> float | None:
    line = values[tuple(slice(None) if a == axis else i for a, i in enumerate(place))]
    known, i = np.flatnonzero(~np.isnan(line)), place[axis]
    if not (known < i).any() or not (known > i).any():
        return None
    return float(np.interp(axis_logs[i], axis_logs[known], line[known]))


def _outside(values: Any, axis_logs: Any, place: tuple[int, ...], axis: int) -> float | None:
    """Beyond the last known node (twice as much takes twice as long); level below the first."""
    line = values[tuple(slice(None) if a == axis else i for a, i in enumerate(place))]
    known, i = np.flatnonzero(~np.isnan(line)), place[axis]
    if not len(known):
        return None
    if known[-1] < i:
        return float(line[known[-1]] + axis_logs[i] - axis_logs[known[-1]])
    return float(line[known[0]])


# --- element-wise kernels -----------------------------------------------------------------------------------

MODELS = ("Llama-2-7b-hf", "Llama-2-70b-hf", "Meta-Llama-3-8B")
BYTE_NODES = tuple(4.0**i for i in range(5, 16))


def elementwise(folder: Path, name: str) -> dict[str, Any]:
    """Medians by bytes read and written, over models, widths and ranks."""
    paths = {model: folder / f"meta-llama/{model}/mlp.csv" for model in MODELS}
    frames = [pd.read_csv(path).assign(model=model) for model, path in paths.items() if path.exists()]
    table = pd.concat(frames, ignore_index=True)
    tp, tokens = table.num_tensor_parallel_workers, table.num_tokens
    head = table.n_embd / table.n_head
    widths = {
        "norm": 2 * table.n_embd,
        "rope": 2 * head * (table.n_head + table.n_kv_head) / tp,
        "activation": 3 * table.n_expanded_embd / tp,
        "add": 3 * table.n_embd,
    }
    columns = {"norm": "input_layernorm", "rope": "attn_rope", "activation": "mlp_act", "add": "add"}
    curves, errors, regions, points = {}, [], [], 0
    for kind, width in widths.items():
        x = 2.0 * width.to_numpy() * tokens.to_numpy()
        y = 1e-3 * table[f"time_stats.{columns[kind]}.median"].to_numpy()
        used = np.isfinite(y) & (y > 0)
        keys = list(zip([kind] * len(x), table.model, tp, tokens, strict=True))
        held = np.array([is_held_out("elementwise", *key) for key in keys])
        trained = _byte_curve(x[used & ~held], y[used & ~held])
        for moved, seconds in zip(x[used & held], y[used & held], strict=True):
            errors.append(on_curve(trained, moved) / seconds - 1)
            regions.append(f"{kind}, {'to 16 MB' if moved <= 16e6 else 'over 16 MB'}")
        curves[kind] = _byte_curve(x[used], y[used]).model_dump()
        points += int(used.sum())
    made = origin(
        "Vidur compute profiles of Llama-2-7B, Llama-2-70B and (A100) Llama-3-8B, 1-8 ranks",
        "MIT (Microsoft)",
        "1 kB to 1 GB moved; 1-4096 tokens (32768 for Llama-3)",
        url=VIDUR,
        points=points,
        holdout=scores(regions, errors),
    )
    if name == "H200-141GB":
        made |= {"derivation": "H100's times (the same chip, slower memory: an upper bound)", "holdout": {}}
    return {"origin": made, "curves": curves}


def _byte_curve(x: Any, y: Any) -> Curve:
    """Least squares of the logarithm at the nodes that points lie around, made monotone."""
    nodes = [n for n in BYTE_NODES if ((x >= n / 4) & (x <= n * 4)).any()]
    kept = (x >= nodes[0]) & (x <= nodes[-1])
    logs = [np.log(np.array(nodes))]
    value = np.exp(_solve(_hats([np.log(x[kept])], logs), np.log(y[kept]), [len(nodes)]))
    return Curve(at=tuple(nodes), value=tuple(digits(v) for v in np.maximum.accumulate(value)))


# --- all-reduce ---------------------------------------------------------------------------------------------

NCCL_FROM_BYTES = 4 * 2**20
"""From here on vLLM's custom all-reduce hands over to NCCL."""


def all_reduce(data: Path, folder: str) -> dict[str, Any]:
    custom = _custom(data, folder)
    a100_custom, a100_nccl = _custom(data, "a100_sxm"), _nccl(data)
    source = "aiconfigurator, vLLM 0.14.0 custom all-reduce inside CUDA graphs (NCCL from 4 MiB on)"
    range_ = "2, 4, 8 GPUs of one NVSwitch node, 256 bytes to 1 GiB"
    made = {
        "custom": {
            "origin": origin(source, "Apache-2.0 (NVIDIA)", range_, url=AICONFIGURATOR, points=_count(custom)),
            "gpus": {g: c.model_dump() for g, c in custom.items()},
        }
    }
    if folder == "a100_sxm":
        nccl, more = a100_nccl, {"holdout": _vidur_errors(data, "a100_dgx", a100_nccl)}
        source = "aiconfigurator, NCCL 2.27.3; scored against Vidur's all-reduces on a DGX A100"
    else:
        nccl = {g: _scaled(custom[g], a100_custom[g], a100_nccl[g]) for g in custom}
        source = "aiconfigurator, custom all-reduce of this device and NCCL 2.27.3 of A100"
        more = {"derivation": "below 4 MiB the custom all-reduce times A100's ratio of NCCL to custom"}
        if folder == "h100_sxm":
            more["holdout"] = _vidur_errors(data, "h100_dgx", nccl)
    more["points"] = _count(nccl)
    made["nccl"] = {
        "origin": origin(source, "Apache-2.0 (NVIDIA)", range_, url=AICONFIGURATOR, **more),
        "gpus": {g: c.model_dump() for g, c in nccl.items()},
    }
    return made


def _count(curves: dict[int, Curve]) -> int:
    return sum(len(c.at) for c in curves.values())


def _curves(table: pd.DataFrame) -> dict[int, Curve]:
    """``message_size`` is in elements of two bytes. Medians with a running maximum: single points are outliers."""
    made = {}
    for gpus, rows in table.groupby("num_gpus"):
        by = rows.groupby("message_size").latency.median()
        smooth = np.maximum.accumulate(by.rolling(3, center=True, min_periods=1).median().to_numpy())
        at = tuple(2.0 * size for size in by.index)
        made[int(gpus)] = Curve(at=at, value=tuple(digits(1e-3 * v) for v in smooth))
    return made


def _custom(data: Path, folder: str) -> dict[int, Curve]:
    table = pd.read_parquet(data / f"aiconfigurator/{folder}/comm/vllm/0.14.0/custom_allreduce_perf.parquet")
    return _curves(table[table.backend == "vllm_graph"])


def _nccl(data: Path) -> dict[int, Curve]:
    table = pd.read_parquet(data / "aiconfigurator/a100_sxm/comm/nccl/2.27.3/nccl_perf.parquet")
    return _curves(table[(table.op_name == "all_reduce") & (table.nccl_dtype == "half")])


def _scaled(custom: Curve, a100_custom: Curve, a100_nccl: Curve) -> Curve:
    ratio = [on_curve(a100_nccl, x) / on_curve(a100_custom, x) if x < 2 * NCCL_FROM_BYTES else 1.0 for x in custom.at]
    value = np.maximum.accumulate([v * r for v, r in zip(custom.value, ratio, strict=True)])
    return Curve(at=custom.at, value=tuple(digits(v) for v in value))


def _vidur_errors(data: Path, node: str, curves: dict[int, Curve]) -> dict[str, Any]:
    table = pd.read_csv(data / f"vidur/profiling/network/{node}/all_reduce.csv")
    table = table[(table.num_workers == table.devices_per_node) & table.num_workers.isin(list(curves))]
    errors, regions = [], []
    medians = table.groupby(["num_workers", "size"])["time_stats.all_reduce.median"].median()
    for row in medians.reset_index().itertuples():
        errors.append(on_curve(curves[int(row[1])], float(row[2])) / (1e-3 * row[3]) - 1)
        regions.append(f"Vidur, {int(row[1])} GPUs, {'to 4 MB' if row[2] <= 4e6 else 'over 4 MB'}")
    return scores(regions, errors)


# --- links -------------------------------------------------------------------------------------------------


def links(data: Path, name: str) -> dict[str, Any]:
    measured = pd.read_csv(data / "hardware/transfer_bandwidth_measured.csv")

    def gb(gpu: str, path: str, word: str) -> float:
        rows = measured[(measured.gpu == gpu) & (measured.path == path) & measured.condition.str.contains(word)]
        return 1e9 * float(rows.value_gb_s.iloc[0])

    if name.startswith("A100"):
        made = {
            "host_bytes_per_s": gb("A100-SXM4-80GB", "host_to_device", "unidirectional"),
            "disk_bytes_per_s": gb("A5000-24GB", "nvme_raid0_to_device", "ServerlessLLM"),
            "disk_plain_bytes_per_s": gb("A5000-24GB", "nvme_raid0_to_device", "safetensors"),
        }
        source = "nvbandwidth (NVIDIA developer forum topic 352186); disk: ServerlessLLM's NVMe RAID of an A5000"
    else:
        made = {
            "host_bytes_per_s": gb("H100-SXM-80GB", "storage_or_dram_to_device", "cached"),
            "disk_bytes_per_s": gb("H100-SXM-80GB", "nvme_to_device", "ServerlessLLM"),
            "disk_plain_bytes_per_s": gb("H100-SXM-80GB", "nvme_to_device", "safetensors"),
        }
        source = "ServerlessLLM, benchmarks/results/h100_2025: cached and random checkpoints"
    made["origin"] = origin(source, "Apache-2.0 / facts", "one device loading, pinned memory, PCIe", url=SERVERLESS)
    if name == "H200-141GB":
        made["origin"]["derivation"] = "H100's: the same host interface"
    return made
