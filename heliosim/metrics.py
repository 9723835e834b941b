"""Numbers of a run: pure functions from its tables to a ``Summary``, and the comparison of two summaries.

Keys follow the JSON of ``vllm bench serve`` where it has one. Definitions:

- *Which requests*: those that arrived at or after ``after_s`` (warm-up is a filter; nothing is erased);
  tokens are theirs. *offered* counts them all, *completed* those that finished, *refused* the rest.
- *duration* (s): first arrival to last finish of those requests. Rates are counts over this duration.
  Steps count for the part that lies inside it, unless stated otherwise.
- *TTFT* (ms): arrival to first token. *E2E* (``e2el``, ms): arrival to last token. *Queue* (ms): arrival to
  the start of the first step the request took part in.
- *TPOT* (ms): (last token - first token) / (n - 1), per request of n >= 2 tokens. Its mean is a mean over
  requests; ``token_weighted_tpot_ms`` divides the sum of those spans by the sum of n - 1.
- *ITL* (ms): gaps between successive tokens of a request, pooled over requests.
- Percentiles interpolate linearly. What has no data is None: never 0, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from heliosim.energy_metrics import energy_figures
from heliosim.fleet_metrics import held_until, load_rows, peak_together, replica_codes
from heliosim.types import Seconds

if TYPE_CHECKING:
    import pyarrow as pa

    from heliosim.formats.results import RunResults

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Slo:
    """Limits one request must meet, milliseconds; None: no limit.

    A request of one token has no TPOT and meets any TPOT limit. A refused request meets nothing.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "e2el_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")

    def met(self, ttft_ms: Floats, tpot_ms: Floats, e2el_ms: Floats) -> Bools:
        """Which finished requests meet every limit; NaN means that the request has no such time."""
        passed = np.ones(len(ttft_ms), dtype=np.bool_)
        for limit, values in ((self.ttft_ms, ttft_ms), (self.tpot_ms, tpot_ms), (self.e2el_ms, e2el_ms)):
            if limit is not None:
                passed &= np.isnan(values) | (values <= limit)
        return passed


@dataclass(frozen=True)
class Summary:
    """One run in numbers. Units are in the names; see the module for definitions. None: no data.

    Time-averaged and peak bytes use each step's state as it left it, held until the replica's next step starts (or
    until it fails), summed over replicas at each time.
    ``mean_batch_size``: rows per step, over steps that ran a batch. ``layers_per_token``: layers the token's
    step executed, mean over tokens; ``mean_exit_layer``: where the token left. ``exit_mix``: share of all
    tokens by model and exit layer. ``low_confidence_share``: share of tokens whose confidence at their exit
    is below the threshold TH (under a threshold rule such a token left at the deepest resident layer: a
    breach). ``transitions``: changes of placement after a replica's first load, evaluations included and loads
    after a restart not; ``transition_sequence`` lists every load. ``load_s``: seconds that loads took, each
    replica's first one excluded; ``initial_load_s`` is the longest of those; ``exposed_load_s``: the part in which no
    step could run because of them (all of it, unless loads overlap). ``agreement``: share of tokens
    equal to what the full model would have emitted there, over tokens where that is known. ``energy_j``: joules
    of all steps; None is "unavailable". ``utilisation``: share of the duration in which a step or a load was
    going on, mean over replicas (time down counts as idle). ``recomputed_tokens``: tokens whose KV preempted requests
    gave up, to be computed again. ``prediction_tau`` and ``prediction_mae_tokens``: how right the predicted lengths of
    finished requests were: Kendall's tau-b with the true ones, and the mean absolute error; None: nobody predicted.
    ``prefill_energy_j``, ``decode_energy_j``, ``load_energy_j``, ``probe_energy_j`` share ``energy_j`` out by cause
    (``energy_metrics``); ``idle_energy_j`` is drawn beside it while servers do nothing. ``joules_per_token``,
    ``joules_per_prompt`` and ``wh_per_prompt``: of ``energy_j``, by completed tokens and prompts; ``..._with_idle``:
    with idle energy. ``by_class``: of each class of requests, if there are several, counts and latencies
    (``CLASS_METRICS``).
    """

    offered: int
    completed: int
    refused: int
    total_input_tokens: int
    total_output_tokens: int
    duration: float | None
    request_throughput: float | None
    output_throughput: float | None
    total_token_throughput: float | None
    request_goodput: float | None
    slo_attainment: float | None
    mean_ttft_ms: float | None
    median_ttft_ms: float | None
    p90_ttft_ms: float | None
    p99_ttft_ms: float | None
    mean_tpot_ms: float | None
    median_tpot_ms: float | None
    p90_tpot_ms: float | None
    p99_tpot_ms: float | None
    token_weighted_tpot_ms: float | None
    mean_itl_ms: float | None
    median_itl_ms: float | None
    p90_itl_ms: float | None
    p99_itl_ms: float | None
    mean_e2el_ms: float | None
    median_e2el_ms: float | None
    p90_e2el_ms: float | None
    p99_e2el_ms: float | None
    mean_queue_ms: float | None
    median_queue_ms: float | None
    p90_queue_ms: float | None
    p99_queue_ms: float | None
    steps: int
    mean_batch_size: float | None
    max_batch_size: int | None
    mean_weights_bytes: float | None
    peak_weights_bytes: int | None
    mean_kv_bytes: float | None
    peak_kv_bytes: int | None
    layers_per_token: float | None
    mean_exit_layer: float | None
    exit_mix: Mapping[str, Mapping[int, float]]
    low_confidence_share: float | None
    perplexity: float | None
    agreement: float | None
    transitions: int
    transition_sequence: tuple[str, ...]
    initial_load_s: float | None
    load_s: float | None
    exposed_load_s: float | None
    probe_request_share: float | None
    probe_token_share: float | None
    preemptions: int
    energy_j: float | None
    utilisation: float | None
    recomputed_tokens: int | None = None
    prediction_tau: float | None = None
    prediction_mae_tokens: float | None = None
    prefill_energy_j: float | None = None
    decode_energy_j: float | None = None
    load_energy_j: float | None = None
    probe_energy_j: float | None = None
    idle_energy_j: float | None = None
    joules_per_token: float | None = None
    joules_per_prompt: float | None = None
    wh_per_prompt: float | None = None
    joules_per_token_with_idle: float | None = None
    wh_per_prompt_with_idle: float | None = None
    by_class: Mapping[int, Mapping[str, float | None]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: exit layers become text keys, tuples lists."""
        value = asdict(self)
        value["exit_mix"] = {m: {str(e): s for e, s in mix.items()} for m, mix in self.exit_mix.items()}
        value["transition_sequence"] = list(self.transition_sequence)
        value["by_class"] = {str(k): dict(found) for k, found in self.by_class.items()}
        return value

    def value(self, metric: str) -> float | None:
        """A scalar metric by name. Raises KeyError for an unknown one, and for those that are no number."""
        if metric not in SCALARS:
            raise KeyError(metric)
        found = getattr(self, metric)
        return None if found is None else float(found)


SCALARS: tuple[str, ...] = tuple(
    f.name for f in fields(Summary) if f.name not in {"exit_mix", "transition_sequence", "by_class"}
)
"""Names of all metrics that are one number."""
CLASS_METRICS = ("requests", "mean_ttft_ms", "p99_ttft_ms", "mean_e2el_ms", "p99_e2el_ms", "mean_queue_ms")
"""What is said of each class of requests; latencies are those of finished ones."""


@dataclass(frozen=True)
class MetricSpec:
    """How a metric is shown: ``value * scale`` with ``digits`` significant digits and ``unit`` behind it. ``is_count``:
    whole numbers are shown whole.
    """

    name: str
    label: str
    unit: str
    scale: float = 1.0
    better: Literal["higher", "lower", "neither"] = "neither"
    digits: int = 3
    is_count: bool = False

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """The number without its unit; an en dash where there is none."""
        if value is None:
            return "–"
        if self.is_count and value == round(value):
            return f"{value:,.0f}"
        return significant(value * self.scale, self.digits)

    def width_text(self, half_width: float, mean: float | None) -> str:
        """A half-width to two significant digits, with no more decimals than its mean: what is less is ``< 0.1``."""
        text = significant(half_width * self.scale, 2)
        if mean is None:
            return text
        decimals = _decimals(self.text(mean))
        if _decimals(text) <= decimals:
            return text
        least = 10.0**-decimals
        if half_width * self.scale < least / 2:
            return f"< {least:.{decimals}f}" if half_width else "0"
        return f"{half_width * self.scale:,.{decimals}f}"


def _decimals(text: str) -> int:
    return len(text.partition(".")[2])


def significant(value: float, digits: int = 3) -> str:
    """A number for people: ``digits`` significant digits, thousands apart, never in powers of ten.

    Whole parts are never rounded away: 12345 stays 12,345.
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def _specs() -> dict[str, MetricSpec]:
    known = [
        MetricSpec("output_throughput", "Output throughput", "tok/s", better="higher", digits=4),
        MetricSpec("request_throughput", "Request throughput", "req/s", better="higher", digits=4),
        MetricSpec("request_goodput", "Goodput", "req/s", better="higher", digits=4),
        MetricSpec("slo_attainment", "SLO attainment", "%", 100, "higher"),
        MetricSpec("token_weighted_tpot_ms", "TPOT, token-weighted", "ms", better="lower"),
        MetricSpec("mean_batch_size", "Batch size, mean", "rows"),
        MetricSpec("max_batch_size", "Batch size, max", "rows", is_count=True),
        MetricSpec("mean_weights_bytes", "Weights, mean", "MB", 1e-6, "lower"),
        MetricSpec("peak_weights_bytes", "Weights, peak", "MB", 1e-6, "lower"),
        MetricSpec("mean_kv_bytes", "KV in use, mean", "MB", 1e-6),
        MetricSpec("peak_kv_bytes", "KV in use, peak", "MB", 1e-6),
        MetricSpec("layers_per_token", "Layers per token", "layers", better="lower"),
        MetricSpec("mean_exit_layer", "Exit layer, mean", "layers"),
        MetricSpec("low_confidence_share", "Low-confidence tokens", "%", 100, "lower"),
        MetricSpec("perplexity", "Perplexity", "", better="lower", digits=4),
        MetricSpec("agreement", "Agreement with full model", "%", 100, "higher"),
        MetricSpec("load_s", "Loading, after the first", "s", better="lower"),
        MetricSpec("exposed_load_s", "Loading, exposed", "s", better="lower"),
        MetricSpec("energy_j", "Energy", "J", better="lower"),
        MetricSpec("utilisation", "Utilisation", "%", 100),
        MetricSpec("duration", "Duration", "s"),
        MetricSpec("transitions", "Transitions", "", is_count=True),
        MetricSpec("preemptions", "Preemptions", "", is_count=True),
        MetricSpec("prefill_energy_j", "Energy, reading", "J", better="lower"),
        MetricSpec("decode_energy_j", "Energy, decoding", "J", better="lower"),
        MetricSpec("load_energy_j", "Energy, loads", "J", better="lower"),
        MetricSpec("probe_energy_j", "Energy, evaluations", "J", better="lower"),
        MetricSpec("idle_energy_j", "Energy, idle", "J", better="lower"),
        MetricSpec("joules_per_token", "Energy per token", "J", better="lower"),
        MetricSpec("joules_per_prompt", "Energy per prompt", "J", better="lower"),
        MetricSpec("wh_per_prompt", "Energy per prompt", "Wh", better="lower"),
        MetricSpec("joules_per_token_with_idle", "Energy per token, idle included", "J", better="lower"),
        MetricSpec("wh_per_prompt_with_idle", "Energy per prompt, idle included", "Wh", better="lower"),
        MetricSpec("recomputed_tokens", "Recomputed tokens", "tokens", better="lower", is_count=True),
        MetricSpec("prediction_tau", "Predicted lengths, Kendall tau", ""),
        MetricSpec("prediction_mae_tokens", "Predicted lengths, mean absolute error", "tokens"),
        MetricSpec("completed", "Completed", "requests", is_count=True),
        MetricSpec("refused", "Refused", "requests", better="lower", is_count=True),
        MetricSpec("offered", "Offered", "requests", is_count=True),
        MetricSpec("steps", "Steps", "", is_count=True),
        MetricSpec("total_input_tokens", "Total input tokens", "tokens", is_count=True),
        MetricSpec("total_output_tokens", "Total output tokens", "tokens", is_count=True),
        MetricSpec("total_token_throughput", "Total token throughput", "tok/s", better="higher", digits=4),
        MetricSpec("initial_load_s", "Loading, the first", "s", better="lower"),
        MetricSpec("probe_request_share", "Probe requests", "%", 100),
        MetricSpec("probe_token_share", "Probe tokens", "%", 100),
    ]
    families = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E", "queue": "Queueing"}
    points = {"mean": "mean", "median": "median", "p90": "p90", "p99": "p99"}
    known += [
        MetricSpec(f"{point}_{family}_ms", f"{name}, {said}", "ms", better="lower")
        for family, name in families.items()
        for point, said in points.items()
    ]
    return {spec.name: spec for spec in known}


METRICS: Mapping[str, MetricSpec] = _specs()
HEADLINE: tuple[str, ...] = (
    "output_throughput",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "p99_e2el_ms",
    "mean_batch_size",
    "layers_per_token",
    "perplexity",
    "agreement",
)
"""The metrics of a headline table: how fast, how patient, how good."""


def metric_spec(name: str) -> MetricSpec:
    """How to show a metric; a plain rendering for those without an entry."""
    return METRICS.get(name) or MetricSpec(name, name.replace("_", " ").capitalize(), "")


# -- summary ---------------------------------------------------------------------------------------


def summarise(
    results: RunResults, after_s: Seconds = 0.0, slo: Slo | None = None, *, threshold: float | None = None
) -> Summary:
    """Every metric of a run. ``after_s``: leave out requests that arrived earlier, seconds.

    ``slo``: limits for goodput and attainment (both None without one). ``threshold``: confidence below which
    a token counts as low, by default the run's own.
    """
    requests, steps, tokens = _Requests(results.requests, after_s), results.steps, results.tokens
    kept = np.isin(_column(tokens, "request_id", np.int64), requests.ids)
    window = requests.window
    limit = _thresholds(results, kept) if threshold is None else threshold
    counts, did = _counts_and_rates(requests), _steps(steps, window, after_s)
    return Summary(
        **counts,
        **_slo(requests, slo),
        **_latencies(requests, _gaps_ms(tokens, kept)),
        **did,
        **energy_figures(steps, window, after_s, results.info.deployed, counts | did),
        **_tokens(tokens, steps, kept, limit, is_quality_known=not results.info.quality_unknown),
        **_transitions(steps, results.events, after_s),
        probe_request_share=_mean(requests.is_probe[requests.finished]),
        preemptions=int(requests.preemptions.sum()),
        **_scheduling(requests),
    )


def _thresholds(results: RunResults, kept: Bools) -> float | Floats:
    """The run's threshold, or the one of each kept token where replicas differ."""
    own = results.thresholds
    if not own:
        return results.threshold
    codes, names = replica_codes(results.steps)
    limits = np.asarray([own.get(name, results.threshold) for name in names])
    limit: Floats = limits[codes[_column(results.tokens, "step", np.int64)[kept]]]
    return limit


class _Requests:
    """Columns of the requests that count, with times in seconds and NaN where a request has none."""

    def __init__(self, table: pa.Table, after_s: Seconds) -> None:
        arrival: Floats = _column(table, "arrival_s", np.float64)
        keep = arrival >= after_s
        self.ids: Ints = _column(table, "request_id", np.int64)[keep]
        self.arrival = arrival[keep]
        self.admitted: Floats = _column(table, "admitted_s", np.float64)[keep]
        self.first: Floats = _column(table, "first_token_s", np.float64)[keep]
        self.finish: Floats = _column(table, "finish_s", np.float64)[keep]
        self.prompt: Ints = _column(table, "prompt_tokens", np.int64)[keep]
        self.output: Ints = _column(table, "output_tokens", np.int64)[keep]
        self.preemptions: Ints = _column(table, "preemptions", np.int64)[keep]
        self.is_probe: Bools = _column(table, "is_probe", np.bool_)[keep]
        self.priority: Ints = _column(table, "priority", np.int64)[keep]
        self.predicted: Floats = _column(table, "predicted_tokens", np.float64)[keep]
        self.recomputed: Floats = _column(table, "recomputed_tokens", np.float64)[keep]
        self.finished: Bools = (_texts(table, "status") == "finished")[keep]

    @property
    def window(self) -> tuple[Seconds, Seconds] | None:
        """First arrival and last finish; None if nothing finished."""
        if not self.finished.any():
            return None
        return float(self.arrival.min()), float(self.finish[self.finished].max())

    @property
    def ttft_ms(self) -> Floats:
        return 1e3 * (self.first - self.arrival)[self.finished]

    @property
    def e2el_ms(self) -> Floats:
        return 1e3 * (self.finish - self.arrival)[self.finished]

    @property
    def queue_ms(self) -> Floats:
        return 1e3 * (self.admitted - self.arrival)[self.finished]

    @property
    def decode_s(self) -> Floats:
        """First to last token, seconds; NaN for requests of fewer than two tokens."""
        return np.where(self.output >= 2, self.finish - self.first, np.nan)[self.finished]

    @property
    def tpot_ms(self) -> Floats:
        return 1e3 * self.decode_s / np.maximum(1, self.output - 1)[self.finished]


def request_latencies(results: RunResults, after_s: Seconds = 0.0) -> dict[str, Floats]:
    """TTFT, TPOT and E2E of the finished requests, ms, each without the requests that have none."""
    r = _Requests(results.requests, after_s)
    return {name: v[~np.isnan(v)] for name, v in (("ttft", r.ttft_ms), ("tpot", r.tpot_ms), ("e2el", r.e2el_ms))}


def _counts_and_rates(r: _Requests) -> dict[str, Any]:
    inputs, outputs = int(r.prompt[r.finished].sum()), int(r.output[r.finished].sum())
    completed = int(r.finished.sum())
    duration = None if r.window is None else r.window[1] - r.window[0]

    def rate(count: int) -> float | None:
        return count / duration if duration else None

    return {
        "offered": len(r.ids),
        "completed": completed,
        "refused": len(r.ids) - completed,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "duration": duration,
        "request_throughput": rate(completed),
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(inputs + outputs),
    }


def _slo(r: _Requests, slo: Slo | None) -> dict[str, Any]:
    """Goodput: requests within the SLO per second. Attainment: their share of all requests *offered*."""
    if slo is None or not len(r.ids):
        return {"request_goodput": None, "slo_attainment": None}
    good = int(slo.met(r.ttft_ms, r.tpot_ms, r.e2el_ms).sum())
    duration = None if r.window is None else r.window[1] - r.window[0]
    return {"request_goodput": good / duration if duration else None, "slo_attainment": good / len(r.ids)}


def _latencies(r: _Requests, itl_ms: Floats) -> dict[str, Any]:
    found: dict[str, Any] = {}
    families = {"ttft": r.ttft_ms, "tpot": r.tpot_ms, "itl": itl_ms, "e2el": r.e2el_ms, "queue": r.queue_ms}
    for name, values in families.items():
        found[f"mean_{name}_ms"] = _mean(values)
        for point, share in (("median", 50), ("p90", 90), ("p99", 99)):
            found[f"{point}_{name}_ms"] = _percentile(values, share)
    decode = r.decode_s
    spans = decode[~np.isnan(decode)]
    intervals = (r.output[r.finished] - 1)[~np.isnan(decode)].sum()
    found["token_weighted_tpot_ms"] = 1e3 * float(spans.sum()) / int(intervals) if intervals else None
    return found


def _scheduling(r: _Requests) -> dict[str, Any]:
    """What an order of service may want to know: cost of preemption, rightness of predictions, classes."""
    is_known = not np.isnan(r.recomputed).any()
    told = r.finished & ~np.isnan(r.predicted)
    predicted, true = r.predicted[told], r.output[told].astype(float)
    found: dict[str, Any] = {
        "recomputed_tokens": int(r.recomputed.sum()) if is_known else None,
        "prediction_tau": kendall_tau(predicted, true),
        "prediction_mae_tokens": _mean(np.abs(predicted - true)),
        "by_class": {},
    }
    classes = sorted(set(r.priority.tolist()))
    if len(classes) > 1:
        found["by_class"] = {k: _of_class(r, r.priority == k) for k in classes}
    return found


def kendall_tau(a: Floats, b: Floats) -> float | None:
    """Kendall's tau-b of two columns; None for fewer than two rows, or where one column is all the same."""
    if len(a) < 2:
        return None
    from scipy.stats import kendalltau

    tau = float(kendalltau(a, b).statistic)
    return None if math.isnan(tau) else tau


def _of_class(r: _Requests, own: Bools) -> dict[str, float | None]:
    done = own[r.finished]
    times = {"ttft": r.ttft_ms[done], "e2el": r.e2el_ms[done], "queue": r.queue_ms[done]}
    found: dict[str, float | None] = {"requests": int(own.sum())}
    for name in CLASS_METRICS[1:]:
        point, family, _ = name.split("_")
        found[name] = _mean(times[family]) if point == "mean" else _percentile(times[family], 99)
    return found


def _gaps_ms(tokens: pa.Table, kept: Bools) -> Floats:
    """Times between successive tokens of each request, ms."""
    request = _column(tokens, "request_id", np.int64)[kept]
    position = _column(tokens, "position", np.int64)[kept]
    time = _column(tokens, "time_s", np.float64)[kept]
    order = np.lexsort((position, request))
    same = request[order][1:] == request[order][:-1]
    gaps: Floats = 1e3 * np.diff(time[order])[same]
    return gaps


def _steps(steps: pa.Table, window: tuple[Seconds, Seconds] | None, after_s: Seconds) -> dict[str, Any]:
    """What the steps did and what memory held."""
    start, seconds = _column(steps, "start_s", np.float64), _column(steps, "seconds", np.float64)
    late = start >= after_s
    ran = _is(steps, "kind", "run") & late
    rows = _column(steps, "rows", np.int64)[ran]
    is_metered = steps["energy_j"].null_count < len(start)
    energy = _column(steps, "energy_j", np.float64)[late] if is_metered else np.zeros(0)
    found: dict[str, Any] = {
        "steps": int(ran.sum()),
        "mean_batch_size": _mean(rows),
        "max_batch_size": int(rows.max()) if len(rows) else None,
        "energy_j": float(energy.sum()) if len(energy) and not np.isnan(energy).any() else None,
        "utilisation": None,
    }
    for name in ("weights", "kv"):
        found |= {f"mean_{name}_bytes": None, f"peak_{name}_bytes": None}
    if window is None or not len(start) or window[1] <= window[0]:
        return found
    del rows, energy, late, ran  # a long run has millions of steps
    a, b = window
    codes, names = replica_codes(steps)
    end = start + seconds
    del seconds
    held = _inside(start, held_until(start, end, codes, b), window)
    busy = _inside(start, end if len(names) == 1 else end.copy(), window)
    found["utilisation"] = float(busy.sum()) / (b - a) / len(names)
    if len(names) == 1:
        del start, end, codes
    is_lost = _is(steps, "kind", "lost")
    is_empty = is_lost | _is(steps, "running", 0)
    # What a failure interrupts holds nothing afterwards. KV in use is what a step held; once nobody runs any more,
    # nothing is held until the next one.
    for name, column, is_over in (("weights", "weights_bytes", is_lost), ("kv", "kv_used_bytes", is_empty)):
        value = _column(steps, column, np.int64)
        if held.sum() > 0:
            lasting = np.where(is_over, busy, held)
            lasting *= value
            total = float(lasting.sum())
            del lasting
            found[f"mean_{name}_bytes"] = total * len(names) / float(held.sum())
            together = peak_together(start, end, value, is_over, codes, window) if len(names) > 1 else None
            alone = int(np.max(value, where=held > 0, initial=0))
            found[f"peak_{name}_bytes"] = alone if together is None else together
    return found


def _inside(start: Floats, end: Floats, window: tuple[Seconds, Seconds]) -> Floats:
    """How much of each span lies inside the window, s. Written over ``end``: a long run has millions of steps."""
    np.minimum(end, window[1], out=end)
    end -= np.maximum(start, window[0])
    return np.clip(end, 0, None, out=end)


def _is(table: pa.Table, name: str, value: str | int) -> Bools:
    import pyarrow.compute as pc

    same: Bools = pc.equal(table[name], value).to_numpy()
    return same


def _tokens(
    tokens: pa.Table, steps: pa.Table, kept: Bools, threshold: float | Floats, *, is_quality_known: bool
) -> dict[str, Any]:
    """Where tokens left, how sure and how right they were."""
    step = _column(tokens, "step", np.int64)[kept]
    confidence = _column(tokens, "confidence", np.float64)[kept]
    logprob = _mean(_column(tokens, "logprob", np.float64)[kept])
    agrees = _column(tokens, "agrees", np.float64)[kept]
    walked = step
    if len(step):
        walked = _column(steps, "layers_run", np.int64)[np.searchsorted(_column(steps, "step", np.int64), step)]
    exits = _column(tokens, "exit_layer", np.int64)[kept]
    return {
        "layers_per_token": _mean(walked),
        "mean_exit_layer": _mean(exits),
        "exit_mix": _exit_mix(tokens, kept, exits),
        "low_confidence_share": _mean(confidence < threshold),
        "perplexity": None if logprob is None or not is_quality_known else math.exp(-logprob),
        "agreement": _mean(agrees[~np.isnan(agrees)]) if is_quality_known else None,
        "probe_token_share": _mean(_column(tokens, "is_probe", np.bool_)[kept]),
    }


def _exit_mix(tokens: pa.Table, kept: Bools, exits: Ints) -> dict[str, dict[int, float]]:
    models = _texts(tokens, "model")[kept]
    mix: dict[str, dict[int, float]] = {}
    for model in sorted(set(models.tolist())):
        layers, counts = np.unique(exits[models == model], return_counts=True)
        shares = counts / len(exits)
        mix[model] = dict(zip(layers.tolist(), shares.tolist(), strict=True))
    return mix


def _transitions(steps: pa.Table, events: pa.Table, after_s: Seconds) -> dict[str, Any]:
    """Loads that started at or after ``after_s``, in order; what loads a cold replica is no transition.

    What passed beside steps, and what steps waited for layers, is in the events.
    """
    loads = load_rows(steps)
    is_fetch = _is(steps, "kind", "fetch")
    fetches = _column(steps, "seconds", np.float64)[is_fetch & (_column(steps, "start_s", np.float64) >= after_s)]
    hidden, stalled = _of_events(events, after_s)
    first = [load["seconds"] for load in loads if load["is_first"]]
    shown = [load for load in loads if load["start_s"] >= after_s]
    later = [load for load in shown if not load["is_first"]]
    names = {load["replica"] for load in loads}
    exposed = math.fsum(load["seconds"] for load in later) + math.fsum(fetches) + math.fsum(stalled)
    return {
        "transitions": sum(not load["is_cold"] for load in later),
        "transition_sequence": tuple(_load_text(load, len(names) > 1) for load in shown),
        "initial_load_s": max(first, default=None),
        "load_s": exposed + math.fsum(hidden) if steps.num_rows else None,
        "exposed_load_s": exposed if steps.num_rows else None,
    }


def _of_events(events: pa.Table, after_s: Seconds) -> tuple[list[Seconds], list[Seconds]]:
    """Seconds of transfers that passed beside steps, and seconds that steps waited for layers to arrive."""
    import json

    hidden, stalled = [], []
    wanted = _is(events, "kind", "fetched") | _is(events, "kind", "fetch abandoned") | _is(events, "kind", "stalled")
    rows = events.filter(wanted & (_column(events, "time_s", np.float64) >= after_s))
    for kind, text in zip(rows["kind"].to_pylist(), rows["detail"].to_pylist(), strict=True):
        detail = json.loads(text)
        if kind == "stalled":
            stalled.append(float(detail["seconds"]))
        else:
            hidden.append(float(detail["hidden_s"]))
    return hidden, stalled


def _load_text(load: Mapping[str, Any], says_replica: bool) -> str:
    placement = f"{load['model']}@{load['depth']}"
    text = f"{placement} ({load['reason']})" if load["reason"] else placement
    return f"{load['replica']}: {text}" if says_replica else text


def _column(table: pa.Table, name: str, dtype: Any) -> Any:
    """A column as an array; nulls become NaN where the type has one."""
    if np.issubdtype(dtype, np.floating):
        return table[name].cast("double").to_numpy()
    return table[name].to_numpy().astype(dtype, copy=False)


def _texts(table: pa.Table, name: str) -> npt.NDArray[np.object_]:
    return np.asarray(table[name].to_pylist(), dtype=object)


def _mean(values: npt.NDArray[Any]) -> float | None:
    if values.dtype.kind in "iub":  # the sum is exact, without a list of a million numbers
        return int(values.sum()) / len(values) if len(values) else None
    values = values[~np.isnan(values)]
    return math.fsum(values.tolist()) / len(values) if len(values) else None


def _percentile(values: Floats, share: float) -> float | None:
    values = values[~np.isnan(values)]
    return float(np.percentile(values, share)) if len(values) else None


# -- simulated beside measured ---------------------------------------------------------------------


@dataclass(frozen=True)
class ComparisonRow:
    """One metric, simulated and measured. None: no data.

    ``relative_error``: (simulated - measured mean) / measured mean, signed; None if that mean is 0 and the
    simulation is not. ``is_inside_spread``: the simulated value lies between the least and the greatest
    repeat.
    """

    metric: str
    simulated: float | None
    measured_mean: float | None
    measured_min: float | None
    measured_max: float | None
    repeats: int
    relative_error: float | None
    is_inside_spread: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_summaries(
    simulated: Summary | None, measured: Sequence[Summary], metrics: Sequence[str] = HEADLINE
) -> list[ComparisonRow]:
    """One row per metric: the simulation beside the mean and the range of the repeats."""
    return [_compare(name, simulated, measured) for name in metrics]


def _compare(name: str, simulated: Summary | None, measured: Sequence[Summary]) -> ComparisonRow:
    guess = None if simulated is None else simulated.value(name)
    seen = [v for v in (m.value(name) for m in measured) if v is not None]
    if not seen:
        return ComparisonRow(name, guess, None, None, None, 0, None, None)
    mean = math.fsum(seen) / len(seen)
    error = inside = None
    if guess is not None:
        slack = 1e-9 * max(abs(v) for v in seen)  # sums in another order
        inside = min(seen) - slack <= guess <= max(seen) + slack
        error = (guess - mean) / abs(mean) if mean else 0.0 if guess == 0 else None
    return ComparisonRow(name, guess, mean, min(seen), max(seen), len(seen), error, inside)


@dataclass(frozen=True)
class SystemResult:
    """One system: how it was simulated, how it ran live, and the rows that compare the two.

    ``clock``: clock of the live runs, as said to readers (``cpu`` or ``wall``). ``rows``: given or, if empty,
    worked out from the runs by ``comparison``.
    """

    name: str
    simulated: RunResults | None
    live: Sequence[RunResults] = ()
    clock: str = "cpu"
    rows: Sequence[ComparisonRow] = ()
    after_s: Seconds = 0.0
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if self.simulated is None and not self.live:
            raise ValueError(f"system {self.name!r} has neither a simulated nor a live run")

    @property
    def runs(self) -> Iterator[RunResults]:
        """The simulated run, then the live ones."""
        if self.simulated is not None:
            yield self.simulated
        yield from self.live

    def summaries(self) -> tuple[Summary | None, list[Summary]]:
        """Summary of the simulated run and of each live one."""
        simulated = None if self.simulated is None else summarise(self.simulated, self.after_s, self.slo)
        return simulated, [summarise(run, self.after_s, self.slo) for run in self.live]

    def comparison(self, metrics: Sequence[str] = HEADLINE) -> list[ComparisonRow]:
        """Rows for these metrics, in this order."""
        given = {row.metric: row for row in self.rows}
        absent = [name for name in metrics if name not in given]
        if absent:
            given |= {row.metric: row for row in compare_summaries(*self.summaries(), absent)}
        return [given[name] for name in metrics]
