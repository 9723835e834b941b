"""Kernel tables of aiconfigurator's collector (Parquet): matrix products, attention, all-reduce of one GPU; ms.

``gemm_perf``: m tokens by an n by k matrix. ``context_attention_perf``: prompts of ``isl`` tokens behind ``step``
others; those of one prompt are used. ``generation_attention_perf``: ``batch_size`` rows over ``step`` + 1 tokens.
``custom_allreduce_perf`` (else ``nccl_perf``): messages of so many two-byte elements. They hold products of every shape
rather than a model's: a model's own are read between them, log-log in n and k. Norms, rotary positions, activation and
additions are in none of them and come from the curves of a device that is named for it (``kernels``), as attention
and all-reduce do where their tables are absent. Rows given twice are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import numpy as np

from heliosim.errors import InputError
from heliosim.hardware.architecture import ITEM_BYTES, Matrix
from heliosim.hardware.steps import StepTimes
from heliosim.operators.curves import attention_from_curves
from heliosim.operators.tables import AttentionTime, OperatorTables, ParquetRows, Points, Rows
from heliosim.types import Seconds

MILLISECOND: Seconds = 1e-3
GEMM, CONTEXT, GENERATION = "gemm_perf.parquet", "context_attention_perf.parquet", "generation_attention_perf.parquet"
CUSTOM, NCCL = "custom_allreduce_perf.parquet", "nccl_perf.parquet"
FILES = (GEMM, CONTEXT, GENERATION, CUSTOM, NCCL)
HALF = ("bfloat16", "float16", "half")
MESSAGE_ITEM_BYTES = 2
FEWEST_POINTS = 2

Products = dict[float, dict[tuple[float, float], Seconds]]
"""By tokens m: seconds by (n, k)."""


def find_tables(folder: Path, choice: str = "") -> dict[str, Path]:
    """The tables in a folder or below it. ``choice``: part of the path of the ones wanted, where there are several.

    Raises InputError where one remains ambiguous, or no product table is there.
    """
    found = {}
    for name in FILES:
        paths = sorted(folder.rglob(name)) if folder.is_dir() else []
        if len(paths) > 1:
            paths = [p for p in paths if choice and choice in p.relative_to(folder).as_posix()] or paths
        if len(paths) > 1:
            ways = ", ".join(p.parent.relative_to(folder).as_posix() for p in paths)
            remedy = "Give the folder of one of them, or --tables with a part of its path."
            raise InputError(str(folder), name, f"is there {len(paths)} times: {ways}", remedy)
        if paths:
            found[name] = paths[0]
    if GEMM not in found:
        raise InputError(str(folder), GEMM, "the file is missing, here and in every folder below", "Give its folder.")
    return found


def read_aiconfigurator(files: Mapping[str, Path], kernels: StepTimes) -> OperatorTables:
    """Tables of ``kernels``' model, dtype and ranks, from ``find_tables``; what these lack is that of its device."""
    a, tp, assumed = kernels.architecture, kernels.tp, []
    products, path = _products(files[GEMM], kernels.dtype), files[GEMM]
    reduce, said = _all_reduce(files, kernels)
    assumed += said

    def layer_of(tokens: float, dense: Seconds) -> Seconds:
        moved = tokens * a.hidden * ITEM_BYTES[kernels.dtype]
        return dense + kernels.elementwise(tokens) + (2 * reduce(moved) if tp > 1 else 0.0)

    def head_of(rows: float, dense: Seconds) -> Seconds:
        norm = kernels.kernels.elementwise("norm", 2 * rows * a.hidden * ITEM_BYTES[kernels.dtype])
        gathered = reduce(rows * a.head_matrix(tp).n * ITEM_BYTES[kernels.dtype]) if tp > 1 else 0.0
        return dense + norm + gathered

    layer = tuple((m, layer_of(m, s)) for m, s in _added_up(products, a.matrices(tp), path))
    head = tuple((m, head_of(m, s)) for m, s in _added_up(products, (a.head_matrix(tp),), path))
    decode, prefill = attention_from_curves(kernels)
    for name, what, read in ((GENERATION, "decode", _generation), (CONTEXT, "prefill", _context)):
        if name not in files:
            assumed.append(f"{what} attention has no table: it is that of {kernels.device.name}")
            continue
        times, said = read(files[name], kernels)
        decode, prefill = (times, prefill) if what == "decode" else (decode, times)
        assumed += said
    assumed.append(f"norms, rotary positions, activation and additions are those of {kernels.device.name}")
    return OperatorTables(
        layer=layer,
        head=head,
        once=tuple((m, 0.0) for m, _ in layer[:2]),
        attention=(*decode, *prefill),
        source="aiconfigurator kernel tables",
        licence="of the tables' owner; NVIDIA's own are Apache-2.0",
        assumptions=tuple(assumed),
    )


# --- matrix products -------------------------------------------------------------------------------------------------


def _products(path: Path, dtype: str) -> Products:
    rows = ParquetRows(path, ("gemm_dtype", "m", "n", "k", "latency"))
    wanted = HALF if dtype in HALF else (dtype,)
    found: dict[tuple[float, float, float], list[Seconds]] = {}
    kinds = set()
    for i in range(len(rows)):
        kinds.add(rows.text(i, "gemm_dtype"))
        if rows.text(i, "gemm_dtype") in wanted:
            m, n, k = (rows.number(i, name, 1) for name in ("m", "n", "k"))
            found.setdefault((m, n, k), []).append(rows.seconds(i, "latency", MILLISECOND))
    if not found:
        remedy = f"It has: {', '.join(sorted(kinds))}. Use another --dtype."
        raise InputError(f"{path}, gemm_dtype", dtype, "no products of it", remedy)
    made: Products = {}
    for (m, n, k), times in found.items():
        made.setdefault(m, {})[n, k] = fmean(times)
    return made


def _added_up(products: Products, matrices: tuple[Matrix, ...], path: Path) -> Points:
    """One after another, at every number of tokens at which all of them lie between measured ones."""
    sides = [sorted({key[axis] for some in products.values() for key in some}) for axis in (0, 1)]
    for matrix in matrices:
        for name, value, known in (("n", _pieces(matrix, sides[0])[1], sides[0]), ("k", float(matrix.k), sides[1])):
            if not known[0] <= value <= known[-1]:
                remedy = "Measure wider products, or use another --tp."
                problem = f"the matrix {matrix.name} lies outside the table, {known[0]:g} to {known[-1]:g}"
                raise InputError(f"{path}, {name}", value, problem, remedy)
    points = []
    for m in sorted(products):
        times = [_between(products[m], matrix, sides) for matrix in matrices]
        if all(t is not None for t in times):
            points.append((m, math.fsum(t for t in times if t is not None)))
    if len(points) < FEWEST_POINTS:
        names = ", ".join(f"{x.name} {x.n} x {x.k}" for x in matrices)
        problem = "fewer than two numbers of tokens have products around all of them"
        raise InputError(f"{path}, m", names, problem, "Measure the products on a full grid.")
    return tuple(points)


def _pieces(matrix: Matrix, widths: list[float]) -> tuple[int, float]:
    """How many equal products stand for a matrix with more outputs than the table has, and how wide each is."""
    pieces = max(1, math.ceil(matrix.n / widths[-1]))
    return pieces, matrix.n / pieces


def _between(times: Mapping[tuple[float, float], Seconds], matrix: Matrix, sides: list[list[float]]) -> Seconds | None:
    """Log-log in n and k between the four products around it; None where one of them is not there."""
    pieces, n = _pieces(matrix, sides[0])
    around = [_around(n, sides[0]), _around(float(matrix.k), sides[1])]
    total = 0.0
    for n_side, n_share in around[0]:
        for k_side, k_share in around[1]:
            if n_share and k_share:
                if (n_side, k_side) not in times:
                    return None
                total += n_share * k_share * math.log(times[n_side, k_side])
    return pieces * math.exp(total)


def _around(x: float, known: list[float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two known ones around x, each with its share (logarithms)."""
    if x in known:
        return (x, 1.0), (x, 0.0)
    high = int(np.searchsorted(known, x))
    a, b = known[high - 1], known[high]
    share = math.log(x / a) / math.log(b / a)
    return (a, 1 - share), (b, share)


# --- attention -------------------------------------------------------------------------------------------------------

SHAPE = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", "step", "latency")


def _generation(path: Path, kernels: StepTimes) -> tuple[tuple[AttentionTime, ...], list[str]]:
    """Decode rows of the model's heads; where the table has none, those of as many query heads per KV head, by KV
    groups (rows times KV heads): each group is read for itself.
    """
    a = kernels.architecture
    heads, kv_heads = a.rank_heads(kernels.tp), a.rank_kv_heads(kernels.tp)
    rows, mine = _of_width(path, kernels, SHAPE)
    exact = [i for i in mine if rows.number(i, "num_heads") == heads and rows.number(i, KV) == kv_heads]
    alike = exact or [i for i in mine if rows.number(i, "num_heads") * kv_heads == rows.number(i, KV) * heads]
    if not alike:
        raise _no_such_heads(rows, mine, f"{heads} heads and {kv_heads} KV heads")
    found: dict[tuple[float, float], list[Seconds]] = {}
    for i in alike:
        count = rows.number(i, "batch_size", 1) * rows.number(i, KV, 1) / kv_heads
        if count >= 1:
            key = (count, rows.number(i, "step") + 1)
            found.setdefault(key, []).append(rows.seconds(i, "latency", MILLISECOND))
    said = [] if exact else [f"decode attention of {heads} heads over {kv_heads} KV heads is read by KV groups"]
    return tuple(AttentionTime(0, 0, n, c, fmean(found[n, c])) for n, c in sorted(found)), said


def _context(path: Path, kernels: StepTimes) -> tuple[tuple[AttentionTime, ...], list[str]]:
    """Single prompts of the model's heads; where the table has none, those of as many query heads over any KV heads."""
    a = kernels.architecture
    heads, kv_heads = a.rank_heads(kernels.tp), a.rank_kv_heads(kernels.tp)
    rows, mine = _of_width(path, kernels, (*SHAPE, "isl"))
    mine = [i for i in mine if rows.number(i, "batch_size", 1) == 1]
    alike = [i for i in mine if rows.number(i, "num_heads") == heads]
    exact = [i for i in alike if rows.number(i, KV) == kv_heads]
    if not alike:
        raise _no_such_heads(rows, mine, f"{heads} heads")
    found: dict[tuple[float, float], list[Seconds]] = {}
    for i in exact or alike:
        key = (rows.number(i, "isl", 1), rows.number(i, "step"))
        found.setdefault(key, []).append(rows.seconds(i, "latency", MILLISECOND))
    said = [] if exact else [f"prefill attention is that of {heads} heads over other numbers of KV heads"]
    return tuple(AttentionTime(c, b, 0, 0, fmean(found[c, b])) for c, b in sorted(found)), said


KV = "num_key_value_heads"


def _of_width(path: Path, kernels: StepTimes, columns: tuple[str, ...]) -> tuple[Rows, list[int]]:
    """The rows with heads as wide as the model's, and KV kept in half precision where the table says how."""
    rows, width = ParquetRows(path, columns), kernels.architecture.head_dim
    kinds = "kv_cache_dtype"
    half = [i for i in range(len(rows)) if kinds not in rows.columns or rows.text(i, kinds) in HALF]
    mine = [i for i in half if rows.number(i, "head_dim", 1) == width]
    if not mine:
        known = ", ".join(f"{d:g}" for d in sorted({rows.number(i, "head_dim", 1) for i in half}))
        raise InputError(f"{path}, head_dim", width, f"no half-precision rows of it; it has: {known or 'none'}", REMEDY)
    return rows, mine


REMEDY = "Measure it, or leave this table out: attention is then that of --kernels."


def _no_such_heads(rows: Rows, mine: list[int], wanted: str) -> InputError:
    known = sorted({(rows.number(i, "num_heads"), rows.number(i, KV)) for i in mine})
    said = ", ".join(f"{h:g}/{k:g}" for h, k in known[:12]) + (", ..." if len(known) > 12 else "")
    return InputError(f"{rows.path}, num_heads", wanted, f"are not in the table; heads/KV heads there: {said}", REMEDY)


# --- all-reduce ------------------------------------------------------------------------------------------------------


def _all_reduce(files: Mapping[str, Path], kernels: StepTimes) -> tuple[Callable[[float], Seconds], list[str]]:
    """Seconds of one all-reduce of so many bytes, and what is assumed of it."""
    if kernels.tp == 1:
        return (lambda moved: 0.0), []
    if CUSTOM in files:
        path = files[CUSTOM]
        rows = ParquetRows(path, ("num_gpus", "message_size", "latency", "backend"))
        kinds = {rows.text(i, "backend") for i in range(len(rows))}
        graph = {kind for kind in kinds if kind.endswith("graph")} or kinds
        mine = [i for i in range(len(rows)) if rows.text(i, "backend") in graph]
    elif NCCL in files:
        path = files[NCCL]
        rows = ParquetRows(path, ("op_name", "nccl_dtype", "num_gpus", "message_size", "latency"))
        mine = [
            i
            for i in range(len(rows))
            if rows.text(i, "op_name") == "all_reduce" and rows.text(i, "nccl_dtype") in HALF
        ]
    else:
        curve = kernels.kernels
        said = [f"all-reduce has no table: it is that of {kernels.device.name}"]
        return (lambda moved: curve.all_reduce(kernels.host.all_reduce, kernels.tp, moved)), said
    found: dict[float, list[Seconds]] = {}
    for i in mine:
        if rows.number(i, "num_gpus", 1) == kernels.tp:
            size = rows.number(i, "message_size", 1) * MESSAGE_ITEM_BYTES
            found.setdefault(size, []).append(rows.seconds(i, "latency", MILLISECOND))
    if len(found) < FEWEST_POINTS:
        known = ", ".join(f"{g:g}" for g in sorted({rows.number(i, "num_gpus", 1) for i in mine}))
        raise InputError(f"{path}, num_gpus", kernels.tp, f"has too few all-reduces; it has: {known}", "Use that --tp.")
    sizes = sorted(found)
    x, y = np.log(sizes), np.log([fmean(found[s]) for s in sizes])

    def at(moved: float) -> Seconds:
        beyond = max(1.0, moved / sizes[-1])
        return beyond * math.exp(float(np.interp(math.log(moved), x, y)))

    return at, []
