"""A stride as it comes back from the device: tokens appended to texts, ends and guards seen, one step late or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from heliosim.engines.fast.lines import Layout
from heliosim.engines.fast.results import StepResult
from heliosim.engines.running import Done
from heliosim.engines.texts import Texts
from heliosim.types import RequestId, Run, Stride, StrideStep, Tokens, Watch, tick

_NO_IDS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class SaidTokens:
    """``types.StrideTokens`` of a live stride, with the ids of its tokens; arrays [tokens]."""

    requests: npt.NDArray[np.int64]
    exit_layers: npt.NDArray[np.int64]
    confidences: npt.NDArray[np.float64]
    logprobs: npt.NDArray[np.float64]
    ids: npt.NDArray[np.int64] | None


@dataclass
class Told:
    """What was read of a stride so far. ``ended``: (step, request, sum of log-probabilities); ``low_before``: breaches
    the device had counted behind the last step read. ``agrees``: of the tokens of steps, where exits are replayed.
    """

    run: Run
    layout: Layout
    texts: Texts
    eos_ids: tuple[int, ...]
    steps: list[StrideStep] = field(default_factory=list)
    ended: list[tuple[int, RequestId, float]] = field(default_factory=list)
    low_before: int = 0
    agrees: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._requests: list[list[RequestId]] = []
        self._layers: list[npt.NDArray[np.int64]] = []
        self._confidences: list[list[float]] = []
        self._logprobs: list[npt.NDArray[np.float64]] = []
        self._ids: list[npt.NDArray[np.int64]] = []
        self._lasts: list[bool] = []
        self._watch: Watch | None = None if self.run.guard is None else self.run.guard.watch()
        self._unseen = 0
        self._spent = 0.0

    def add(self, result: StepResult | None, seconds: float, work_layers: int) -> bool:
        """Take a step's results (None: it yielded no tokens); True: the stride ends with it."""
        k = len(self.steps)
        layout, chunks = self.layout, self.layout.reads_at(k)
        emitted = 0 if result is None else self._append(k, result)
        decoding = layout.decoding_at(k)
        if result is not None:
            decoding -= int((~result.was_alive[:decoding]).sum())
        like_decoding = sum(chunk.is_decode for chunk in chunks)
        prefill = sum(chunk.count for chunk in chunks) - like_decoding
        layers = work_layers if result is None else result.layers
        rows = decoding + len(chunks)
        self.steps.append(StrideStep(tick(seconds), layers, rows, decoding + like_decoding, prefill, emitted))
        self._spent += seconds
        return self._must_stop(k, result)

    def _append(self, k: int, result: StepResult) -> int:
        """Append a step's tokens to their texts; returns how many there are."""
        lines = self.layout.lines[: len(result.ids)]
        alive = np.flatnonzero(result.was_alive)
        ids, logprobs, tops = result.ids.tolist(), result.logprobs.tolist(), result.tops.tolist()
        requests, lasts, confidences = [], [], []
        for i in alive.tolist():
            line = lines[i]
            is_last = self.texts.append(line.request, ids[i], logprobs[i], self.eos_ids)
            if is_last:
                self.ended.append((k, line.request, line.text.logprob_sum))
            requests.append(line.request)
            lasts.append(is_last)
            confidences.append(math.exp(tops[i]))
        if result.confidences is not None and result.agrees is not None:
            confidences = result.confidences.tolist()
            self.agrees.append(result.agrees)
        self._requests.append(requests)
        self._lasts = lasts
        self._confidences.append(confidences)
        self._layers.append(result.exit_layers[alive])
        self._logprobs.append(result.logprobs[alive])
        self._ids.append(result.ids[alive])
        return len(requests)

    def _must_stop(self, k: int, result: StepResult | None) -> bool:
        run, ended = self.run, len(self.ended)
        if k + 1 >= self.layout.steps:
            return True
        if run.max_ends is not None and ended >= run.max_ends:
            return True
        if self.ended and self.ended[-1][0] == k and self.layout.reads_at(k + 1):
            return True
        if ended == len(self.layout.lines) and not self.layout.reads_at(k + 1):
            return True
        if result is not None and self._trips(result):
            return True
        return run.within_s is not None and self._spent >= run.within_s

    @property
    def watched(self) -> float:
        """Confidence below which a token is a breach to the guard; 0 without one."""
        return 0.0 if self._watch is None else self._watch.threshold

    def _trips(self, result: StepResult) -> bool:
        """Whether the guard wants to be asked behind the last step."""
        low, self.low_before = result.breaches - self.low_before, result.breaches
        if self._watch is None or self._watch.is_safe(low):
            return False
        unseen = self._confidences[self._unseen :]
        self._unseen = len(self._confidences)
        ends = np.cumsum([len(step) for step in unseen])
        return self._watch.first_trip(np.concatenate([np.array(step) for step in unseen]), ends) is not None

    def done(self, *, record_ids: bool, is_stride: bool) -> Done:
        """What the run did."""
        if not is_stride:
            sums = {request: total for _, request, total in self.ended}
            return Done(self._as_tokens(record_ids), self.steps[0].layers_run, None, sums)
        requests = np.array([r for step in self._requests for r in step], dtype=np.int64)
        tokens = SaidTokens(
            requests,
            np.concatenate(self._layers or [_NO_IDS]),
            np.array([c for step in self._confidences for c in step], dtype=np.float64),
            np.concatenate(self._logprobs or [np.zeros(0)]),
            np.concatenate(self._ids or [_NO_IDS]) if record_ids else None,
        )
        stride = Stride(self.steps, self.ended, None, tokens)
        agrees = np.concatenate(self.agrees) if self.agrees else None
        return Done(Tokens(), self.steps[-1].layers_run, stride, None, None if agrees is None else lambda: agrees)

    def _as_tokens(self, record_ids: bool) -> Tokens:
        if not self._requests:
            return Tokens(ids=() if record_ids else None)
        return Tokens(
            requests=tuple(self._requests[0]),
            exit_layers=tuple(self._layers[0].tolist()),
            confidences=tuple(self._confidences[0]),
            logprobs=tuple(self._logprobs[0].tolist()),
            lasts=tuple(self._lasts),
            ids=tuple(self._ids[0].tolist()) if record_ids else None,
            agrees=tuple(self.agrees[0].tolist()) if self.agrees else None,
        )
