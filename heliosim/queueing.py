"""Queues whose waiting times are known exactly, served by the real server, batcher and driver.

``simulate_waits`` runs M/G/1 and M/G/c queues through the very code that simulates a model server: only the engine is
made for it, since it takes service times as given. A **customer** is a request, a **server** of the queue is a row of
the batch (``max_batch`` = c). A step ends when the first row's service ends or, if a row is free, when the next
customer arrives; so customers start at the moment a row is free and they are there, as in the textbook. With one row a
customer is one step of one token.

``QueueCase`` has the closed forms. Times are in units of the mean service time. It knows no profile and no model.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from heliosim.predictors import Predictor
from heliosim.recorder import NullRecorder
from heliosim.serving.batcher import ContinuousBatcher
from heliosim.serving.controller import FixedPlacement
from heliosim.serving.memory import MemoryPool
from heliosim.serving.ordered_batcher import OrderedBatcher
from heliosim.serving.ordering import Order
from heliosim.serving.server import Server
from heliosim.streams import stream
from heliosim.types import (
    Arrival,
    Content,
    ExitRule,
    Load,
    ModelSpec,
    Outcome,
    Prediction,
    Request,
    Run,
    Served,
    Tokens,
    tick,
)
from heliosim.workload import OpenLoop

Floats = npt.NDArray[np.float64]
Service = Literal["exponential", "constant", "erlang-2"]

_UNIT_S = 2.0**-10
"""Seconds of one mean service on the simulated clock: about 1 ms, a million ticks, so that rounding does not show."""
_LONGEST = 1 << 20
"""Tokens a customer may come to hold: one per step of its service; no study comes near."""


@dataclass(frozen=True)
class QueueCase:
    """A queue with Poisson arrivals, first come first served: service law, servers, and load (share of capacity)."""

    service: Service
    load: float
    servers: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.load < 1:
            raise ValueError(f"load must lie between 0 and 1, not {self.load}")
        if self.servers < 1 or (self.servers > 1 and self.service != "exponential"):
            raise ValueError(f"no closed form is known here for {self.servers} servers of {self.service} service")

    @property
    def name(self) -> str:
        """Kendall's notation."""
        return f"M/{ {'exponential': 'M', 'constant': 'D', 'erlang-2': 'E2'}[self.service] }/{self.servers}"

    @property
    def mean_wait(self) -> float:
        """Mean waiting time. Pollaczek-Khinchine: load / (1 - load) * (1 + scv) / 2, scv the squared coefficient of
        variation of the service; M/M/c: C / (c (1 - load)), C the probability of waiting (Erlang's C formula).
        """
        if self.servers > 1:
            return erlang_c(self.servers, self.load) / (self.servers * (1 - self.load))
        scv = {"exponential": 1.0, "constant": 0.0, "erlang-2": 0.5}[self.service]
        return self.load / (1 - self.load) * (1 + scv) / 2

    def wait_cdf(self, wait: float) -> float:
        """Probability that a customer waits at most this long.

        M/M/c: 1 - C exp(-c (1 - load) t). M/D/1: Erlang's series of 1909. M/E2/1: the waiting time's Laplace transform
        (Pollaczek-Khinchine) has two poles, so its law is an atom at 0 and two exponentials.
        """
        if wait < 0:
            return 0.0
        if self.service == "constant":
            return _md1_cdf(self.load, wait)
        if self.service == "erlang-2":
            return 1.0 - sum(weight * math.exp(-rate * wait) for weight, rate in _me21_tail(self.load))
        return 1.0 - erlang_c(self.servers, self.load) * math.exp(-self.servers * (1 - self.load) * wait)

    def wait_quantile(self, share: float) -> float:
        """The wait that this share of customers do not exceed; by bisection."""
        low, high = 0.0, 1.0
        if self.wait_cdf(0.0) >= share:
            return 0.0
        while self.wait_cdf(high) < share:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.wait_cdf(middle) < share else (low, middle)
        return (low + high) / 2


def erlang_c(servers: int, load: float) -> float:
    """Probability that a customer of M/M/c has to wait; ``load``: share of capacity."""
    offered, blocked = servers * load, 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def _md1_cdf(load: float, wait: float) -> float:
    """(1 - load) sum_{k <= t} (load (k - t))^k / k! exp(-load (k - t)). Terms alternate: right up to waits of 25."""
    terms = []
    for k in range(int(wait) + 1):
        x = load * (k - wait)
        terms.append((1.0 if k == 0 else x**k / math.factorial(k)) * math.exp(-x))
    return (1 - load) * math.fsum(terms)


def _me21_tail(load: float) -> list[tuple[float, float]]:
    """Weights and rates of P(W > t) = sum weight exp(-rate t) for Erlang-2 service of mean 1.

    W*(s) = (1 - load) (s + 2)^2 / (s^2 + (4 - load) s + 4 (1 - load)); both roots are real and negative.
    """
    b, c = 4 - load, 4 * (1 - load)
    root = math.sqrt(b * b - 4 * c)
    rates = ((b - root) / 2, (b + root) / 2)
    found = []
    for rate, other in (rates, rates[::-1]):
        found.append(((1 - load) * (2 - rate) ** 2 / (other - rate) / rate, rate))
    return found


def shortest_first_mean_wait(case: QueueCase) -> float:
    """Mean waiting time of M/G/1 when the waiting customer with the shortest service goes first and nobody is
    interrupted (Phipps 1956): the mean over service times x of w / (1 - load(x))^2, w = rate E[S^2] / 2 the work found
    in service, load(x) that of customers no longer than x. By quadrature over quantiles; exponential and Erlang-2.
    """
    from scipy.special import gammainc, gammaincinv

    if case.servers > 1 or case.service == "constant":
        raise ValueError("known here for one server of exponential or Erlang-2 service")
    shape = 1 if case.service == "exponential" else 2
    found_s = case.load * (1 + 1 / shape) / 2
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    times = gammaincinv(shape, quantiles) / shape
    return float(np.mean(found_s / (1 - case.load * gammainc(shape + 1, shape * times)) ** 2))


def simulate_waits(
    case: QueueCase,
    customers: int,
    seed: int,
    *names: str | int,
    order: Order | None = None,
    predictor: Predictor | None = None,
) -> Floats:
    """Waiting times of a queue that starts empty, in order of arrival, in mean service times; [customers].

    ``names``: name the streams of this run beside the seed. ``order``: of service; None: first come, first served.
    ``predictor``: tells it service times, in thousandths of the mean.
    """
    from heliosim.simulate import simulate_server

    rng = stream(seed, "queue", *names)
    gaps = rng.exponential(1 / (case.load * case.servers), customers)
    if case.service == "constant":
        service = np.ones(customers)
    elif case.service == "erlang-2":
        service = rng.gamma(2.0, 0.5, customers)
    else:
        service = rng.exponential(1.0, customers)
    times = [tick(_UNIT_S * t) for t in np.cumsum(gaps).tolist()]
    engine = _ServiceEngine([max(tick(_UNIT_S * s), tick(1e-9)) for s in service.tolist()], times, case.servers)
    recorder = _Waits(customers)
    tokens = 1 if case.servers == 1 else _LONGEST
    content = Content("", None, None)
    told: list[Prediction] | None = None
    if predictor is not None:
        lengths = [max(1, round(1000 * s)) for s in service.tolist()]
        told = predictor.predictions(lengths, lengths, int(stream(seed, "queue predictions", *names).integers(2**62)))
    hints: list[Prediction | None] = list(told) if told is not None else [None] * customers
    arrivals = [
        Arrival(Request(k, at, 1, tokens, 0, hint), content)
        for k, (at, hint) in enumerate(zip(times, hints, strict=True))
    ]
    simulate_server(_server(case.servers, recorder, order), engine, OpenLoop(arrivals))
    return recorder.waits / _UNIT_S


def _server(rows: int, recorder: NullRecorder, order: Order | None = None) -> Server:
    """A server with ``rows`` rows and more memory than they can need."""
    model = ModelSpec(
        name="queue",
        layers=1,
        exits=(1,),
        kind="fixed",
        layer_bytes=1,
        base_bytes=1,
        kv_bytes_per_token_layer=1,
        hidden_bytes=1,
        max_context=2 * _LONGEST,
        vocabulary="",
    )
    return Server(
        FixedPlacement(model, ExitRule("none")),
        ContinuousBatcher(rows, max(2, rows)) if order is None else OrderedBatcher(order, rows, max(2, rows)),
        MemoryPool(4 * rows * _LONGEST),
        {model.name: model},
        recorder,
    )


class _Waits(NullRecorder):
    """Keeps how long each request waited, s."""

    def __init__(self, customers: int) -> None:
        self.waits: Floats = np.zeros(customers)

    def served(self, record: Served) -> None:
        assert record.admitted_s is not None, "no customer is refused"
        self.waits[record.id] = record.admitted_s - record.arrival_s


class _ServiceEngine:
    """Rows that each work off the service time of their customer, s. It keeps count of the time itself: a step starts
    where the last one ended, or with the arrival that ended an idle period.
    """

    def __init__(self, service: list[float], arrivals: list[float], rows: int) -> None:
        self.left, self.arrivals, self.rows = service, arrivals, rows
        self.now = 0.0

    def accept(self, arrival: Arrival) -> None:
        self.now = max(self.now, arrival.request.arrival_s)

    def forget(self, request_id: int) -> None:
        raise AssertionError(f"customer {request_id} was refused")

    def perform(self, action: Run | Load) -> Outcome:
        if isinstance(action, Load):
            return Outcome(0.0)
        requests, left = action.batch.requests, self.left
        seconds = min([left[r] for r in requests])
        if len(requests) < self.rows:
            following = bisect_right(self.arrivals, self.now)
            if following < len(self.arrivals):
                seconds = min(seconds, self.arrivals[following] - self.now)
        self.now += seconds
        ended = {}
        for request in requests:
            left[request] -= seconds
            if left[request] == 0.0:
                ended[request] = 0.0
        lasts = tuple([request in ended for request in requests])
        return Outcome(seconds, Tokens(requests, lasts=lasts), 1, None, None, ended)
