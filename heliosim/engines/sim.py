"""The simulated engine: a profile's costs and recorded behaviour in place of a device.

It predicts, for each step, which token leaves where (behaviour replay) and how long the step takes (cost model), from
the same shape a live step would have. It knows true lengths; the server does not.

Decoding requests move in step with each other, so the engine keeps one counter (``ticks``) and, for each of them, the
tick at which it ends. What their tokens will do is laid out in a table of ticks when they begin to decode; a stride of
steps then reads whole rows of it and touches no request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heliosim.behaviour import Behaviour, Text, Walk, source_name
from heliosim.costs import StepCost, StepShape, layers_run, load_seconds, load_terms, shape_of
from heliosim.engines.token_table import TokenTable
from heliosim.errors import OutOfRangeError
from heliosim.noise import NoisePlayer
from heliosim.types import (
    BLOCK_TOKENS,
    Arrival,
    Batch,
    Content,
    ExitRule,
    Load,
    ModelSpec,
    Outcome,
    Placement,
    Request,
    RequestId,
    Run,
    Seconds,
    Stride,
    Tokens,
    blocks_for,
    tick,
)


@dataclass(slots=True, eq=False)
class _Going:
    """A request inside the engine: what it is, which recorded prompt it stands for, and how far it got.

    ``generated`` is true up to tick ``since`` while it decodes. ``length``: tokens it will have generated in all, under
    the text it follows now. ``slot``: its column in the table of ticks.
    """

    request: Request
    content: Content
    sequence: str
    generated: int = 0
    since: int | None = None
    length: int = 0
    slot: int = 0
    walk: Walk | None = None
    logprob_sum: float = 0.0


class SimEngine:
    """``costs``: step cost by model on the run's clock; ``loads``: load coefficients by model; ``behaviour``: None for
    studies of time alone (tokens then have no exits, and no figure of quality can be had).

    ``allow_extrapolation``: answer outside the calibrated batch, context or chunk range instead of refusing;
    ``extrapolated_steps`` counts such steps. ``watts``: mean power while busy; None: energy is unavailable.
    ``noise``: scales each step's expected time; None: every step takes it exactly.
    """

    def __init__(
        self,
        models: Mapping[str, ModelSpec],
        costs: Mapping[str, StepCost],
        loads: Mapping[str, Mapping[str, float]],
        behaviour: Behaviour | None,
        seed: int,
        allow_extrapolation: bool = False,
        watts: float | None = None,
        noise: NoisePlayer | None = None,
    ) -> None:
        self.models, self.costs, self.loads, self.behaviour, self.seed = models, costs, loads, behaviour, seed
        self.allow_extrapolation, self.watts, self.noise = allow_extrapolation, watts, noise
        self.extrapolated_steps = 0
        self.ticks = 0
        self._going: dict[RequestId, _Going] = {}
        self._resident: Placement | None = None
        # Decoding requests in batch order, in parallel lists: themselves, their ids, their last ticks.
        self._decoding: list[_Going] = []
        self._ids: list[RequestId] = []
        self._ends: list[int] = []
        self._columns: npt.NDArray[np.int64] | None = None
        self._table = TokenTable(256, 16)
        self._free_slots = list(range(16))
        self._policy: tuple[Placement, ExitRule] | None = None
        self._walks: dict[tuple[str, Placement, ExitRule], tuple[Text, Walk]] = {}
        self._decode_s: dict[tuple[Placement, int, int, int], Seconds] = {}

    # -- protocol -------------------------------------------------------------------------------------------------

    def accept(self, arrival: Arrival) -> None:
        request, content = arrival.request, arrival.content
        sequence = self.behaviour.assign(request.id, content.task, self.seed) if self.behaviour else ""
        self._going[request.id] = _Going(request, content, sequence)

    def forget(self, request_id: int) -> None:
        self._going.pop(request_id, None)

    def perform(self, action: Run | Load) -> Outcome:
        if isinstance(action, Load):
            return self._load(action)
        self._follow(action.placement, action.exits)
        if tuple(self._ids) != action.batch.decoding:
            self._gather(action.batch.decoding)
        if action.batch.chunks or action.max_steps == 1:
            return self._step(action)
        return self._stride(action)

    # -- loads ----------------------------------------------------------------------------------------------------

    def _load(self, load: Load) -> Outcome:
        spec = self.models[load.placement.model]
        same = self._resident is not None and self._resident.model == load.placement.model
        resident = self._resident.depth if same and self._resident else 0
        kv_bytes = load.kv_blocks * spec.block_bytes(load.placement.depth, load.stores_hidden)
        self._resident = load.placement
        seconds = tick(load_seconds(self.loads[spec.name], load_terms(load, spec, resident, kv_bytes)))
        return Outcome(seconds=seconds, energy_j=self._energy_j(seconds))

    # -- who decodes ----------------------------------------------------------------------------------------------

    def _follow(self, placement: Placement, exits: ExitRule) -> None:
        """Under another placement or rule, texts and exits differ from here on."""
        if self._policy == (placement, exits):
            return
        for going in self._decoding:
            self._catch_up(going)
        self._policy = (placement, exits)
        for k, going in enumerate(self._decoding):
            self._ends[k] = self._lay_out(going)

    def _gather(self, decoding: Sequence[RequestId]) -> None:
        """Make the decoding requests those of a batch, in its order; others stop, keeping what they generated."""
        wanted = set(decoding)
        for going in [g for g in self._decoding if g.request.id not in wanted]:
            self._stop(self._ids.index(going.request.id))
        known = set(self._ids)
        for request in decoding:
            if request not in known:
                self._start(self._going[request])
        order = [self._ids.index(request) for request in decoding]
        self._decoding = [self._decoding[k] for k in order]
        self._ids = [self._ids[k] for k in order]
        self._ends = [self._ends[k] for k in order]
        self._columns = None

    def _start(self, going: _Going) -> None:
        """From the next tick on a request yields a token per step."""
        if self.behaviour is not None:
            if not self._free_slots:
                self._widen()
            going.slot = self._free_slots.pop()
        going.since = self.ticks
        self._decoding.append(going)
        self._ids.append(going.request.id)
        self._ends.append(self._lay_out(going))
        self._columns = None

    def _stop(self, k: int) -> _Going:
        going = self._decoding.pop(k)
        del self._ids[k]
        del self._ends[k]
        self._catch_up(going)
        going.since = None
        if self.behaviour is not None:
            self._free_slots.append(going.slot)
        self._columns = None
        return going

    def _catch_up(self, going: _Going) -> None:
        """Count the tokens generated since the counts were last true."""
        if going.since is None or going.since == self.ticks:
            return
        count = self.ticks - going.since
        if going.walk is not None:
            logprobs = going.walk.logprobs
            at = np.arange(going.generated, going.generated + count) % len(logprobs)
            for logprob in logprobs[at].tolist():
                going.logprob_sum += logprob
        going.generated += count
        going.since = self.ticks

    def _lay_out(self, going: _Going) -> int:
        """Find the text a request follows now and enter what is left of it; returns the tick behind its last token."""
        self._find_text(going)
        left = max(1, going.length - going.generated)
        if going.walk is not None:
            if left > self._table.height:
                self._heighten(left)
            self._table.lay_out(going.slot, going.walk, going.generated, self.ticks, left)
        return self.ticks + left

    def _find_text(self, going: _Going) -> None:
        limit = going.content.output_tokens or going.request.max_tokens
        if self.behaviour is None or self._policy is None:
            going.length = limit
            return
        placement, exits = self._policy
        key = (going.sequence, placement, exits)
        found = self._walks.get(key)
        if found is None:
            text = self.behaviour.text(
                going.sequence, source_name(placement, exits, self.models[placement.model].layers)
            )
            found = self._walks[key] = (text, self.behaviour.walk(text, placement, exits))
        text, going.walk = found
        going.length = limit if going.content.output_tokens or text.end is None else min(limit, text.end)

    def _widen(self) -> None:
        self._remake(self._table.height, 2 * self._table.slots)

    def _heighten(self, rows: int) -> None:
        self._remake(1 << (rows - 1).bit_length(), self._table.slots)

    def _remake(self, height: int, slots: int) -> None:
        """A larger table, with what decoding requests have left laid out anew."""
        self._free_slots += range(self._table.slots, slots)
        self._table = TokenTable(height, slots)
        for going, end in zip(self._decoding, self._ends, strict=False):  # one may be on its way in, without an end
            assert going.walk is not None
            done = 0 if going.since is None else self.ticks - going.since
            self._table.lay_out(going.slot, going.walk, going.generated + done, self.ticks, end - self.ticks)

    # -- one step -------------------------------------------------------------------------------------------------

    def _step(self, run: Run) -> Outcome:
        spec = self.models[run.placement.model]
        tokens, sums = self._emit(run)
        layers = layers_run(run, tokens) if tokens.exit_layers else run.placement.depth
        shape = shape_of(run, Outcome(0.0, tokens, layers), spec)
        self._require_calibrated(spec.name, shape.rows, shape.longest, shape.tokens)
        seconds = self._noisy(tick(self.costs[spec.name].seconds(shape)))
        return Outcome(seconds, tokens, layers, self._energy_j(seconds), None, sums)

    def _emit(self, run: Run) -> tuple[Tokens, dict[RequestId, float]]:
        """The tokens of one step, decode rows and chunks that end a prompt, and what ends with them."""
        requests = list(self._ids)
        exits: list[int] = []
        confidences: list[float] = []
        logprobs: list[float] = []
        agrees: list[bool] = []
        if self.behaviour is not None and requests:
            now = self._table.read(self._slots_in_order(), self.ticks, 1)
            exits, confidences = now.exit_layers[0].tolist(), now.confidences[0].tolist()
            logprobs, agrees = now.logprobs[0].tolist(), now.agrees[0].tolist()
        self.ticks += 1
        ended = self._end_due()
        lasts = [request in ended for request in requests] if ended else [False] * len(requests)
        for chunk in run.batch.chunks:
            if not chunk.emits:
                continue
            going = self._going[chunk.request]
            self._find_text(going)
            requests.append(chunk.request)
            if going.walk is not None:
                at = going.generated % len(going.walk.exit_layers)
                exits.append(int(going.walk.exit_layers[at]))
                confidences.append(float(going.walk.confidences[at]))
                logprobs.append(float(going.walk.logprobs[at]))
                agrees.append(bool(going.walk.agrees[at]))
                going.logprob_sum += logprobs[-1]
            going.generated += 1
            is_last = going.generated >= going.length
            lasts.append(is_last)
            if is_last:
                ended[chunk.request] = going.logprob_sum
                del self._going[chunk.request]
            else:
                self._start(going)
        known = tuple(agrees) if self.behaviour is not None else None
        return Tokens(
            tuple(requests), tuple(exits), tuple(confidences), tuple(logprobs), tuple(lasts), None, known
        ), ended

    def _end_due(self) -> dict[RequestId, float]:
        """Take out the requests that have generated their last token; their log probabilities, summed, by request."""
        ended: dict[RequestId, float] = {}
        while self._ends and (least := min(self._ends)) <= self.ticks:
            going = self._stop(self._ends.index(least))
            ended[going.request.id] = going.logprob_sum
            del self._going[going.request.id]
        return ended

    def _slots_in_order(self) -> npt.NDArray[np.int64]:
        if self._columns is None:
            self._columns = np.array([g.slot for g in self._decoding], dtype=np.int64)
        return self._columns

    # -- many steps -----------------------------------------------------------------------------------------------

    def _stride(self, run: Run) -> Outcome:
        """Decode steps until one ends a request, meets an arrival or trips the guard, all from whole arrays."""
        batch, requests = run.batch, tuple(self._ids)
        most = min(run.max_steps, min(self._ends) - self.ticks)
        grid = self._grid(most)
        if run.guard is not None and grid is not None:
            trip = run.guard.first_trip(grid.confidences)
            most = most if trip is None else trip + 1
        seconds, layers = self._times(run, batch, grid, most)
        steps = len(seconds)
        self.ticks += steps
        ended = self._end_due()
        lasts = tuple(request in ended for request in requests) if ended else (False,) * len(requests)
        total = sum(seconds)
        energies = None if self.watts is None else [self.watts * s for s in seconds]
        stride = Stride(seconds, layers, energies)
        tokens = Tokens(requests, lasts=lasts)
        if grid is not None:
            cut = slice(0, steps)
            stride = Stride(
                seconds,
                layers,
                energies,
                grid.exit_layers[cut],
                grid.confidences[cut],
                grid.logprobs[cut],
                grid.agrees[cut],
            )
        energy = None if energies is None else sum(energies)
        return Outcome(total, tokens, layers[-1], energy, stride, ended)

    def _grid(self, steps: int) -> Walk | None:
        """What the next steps' tokens do, [steps, rows] each."""
        if self.behaviour is None:
            return None
        return self._table.read(self._slots_in_order(), self.ticks, steps)

    def _times(self, run: Run, batch: Batch, grid: Walk | None, most: int) -> tuple[list[Seconds], list[int]]:
        """Seconds and layers of each step up to where the stride ends."""
        spec, depth = self.models[run.placement.model], run.placement.depth
        longest, rows = batch.ticks + max(batch.offsets) + 1, len(self._ids)
        last = min(self._ends) - self.ticks
        ends_at_last = sum(end == last + self.ticks for end in self._ends)
        within, cost = run.within_s, self.costs[spec.name]
        seconds: list[Seconds] = []
        layers: list[int] = []
        total = 0.0
        has_threshold = run.exits.kind == "threshold" and grid is not None
        for k in range(most):
            ended = ends_at_last if k + 1 == last else 0
            self._require_calibrated(spec.name, rows, longest + k, rows)
            if has_threshold:
                assert grid is not None
                shape = self._threshold_shape(run, spec, grid.exit_layers[k], longest + k, ended)
                one = tick(cost.seconds(shape))
                layers.append(shape.layers)
            else:
                key = (run.placement, rows, blocks_for(longest + k), ended)
                known = self._decode_s.get(key)
                if known is None:
                    shape = _decode_shape(rows, longest + k, depth, 1, rows, 0, ended)
                    known = self._decode_s[key] = tick(cost.seconds(shape))
                one = known
                layers.append(depth)
            one = self._noisy(one)
            seconds.append(one)
            total += one
            if within is not None and total >= within:
                break
        return seconds, layers

    def _threshold_shape(
        self, run: Run, spec: ModelSpec, exits: npt.NDArray[np.int64], longest: int, ended: int
    ) -> StepShape:
        """The shape ``costs.shape_of`` finds for decode rows alone under a threshold."""
        depth, deepest = run.placement.depth, int(exits.max())
        layers = depth if run.exits.batching == "full" else deepest
        checks = checked = 0
        for exit_layer in spec.exits:
            if exit_layer > deepest:
                break
            checks += 1
            checked += int((exits >= exit_layer).sum())
        return _decode_shape(len(exits), longest, layers, checks, checked, depth - layers, ended)

    # -- time and energy ------------------------------------------------------------------------------------------

    def _noisy(self, seconds: Seconds) -> Seconds:
        return seconds if self.noise is None else tick(seconds * self.noise.factor(seconds))

    def _energy_j(self, seconds: float) -> float | None:
        return None if self.watts is None else self.watts * seconds

    def _require_calibrated(self, model: str, rows: int, context: int, tokens: int) -> None:
        """Raise OutOfRangeError for a step outside what was calibrated, or count it where that is allowed."""
        cost = self.costs[model]
        if rows <= cost.max_rows and context <= cost.max_context and tokens <= cost.max_tokens:
            return
        self.extrapolated_steps += 1
        if not self.allow_extrapolation:
            raise OutOfRangeError(
                f"profile costs of {model}",
                {"batch": rows, "context": context, "tokens": tokens},
                f"a step lies outside the calibrated range (batch <= {cost.max_rows}, context <= {cost.max_context}, "
                f"tokens per step <= {cost.max_tokens})",
                "Calibrate a wider range, lower the batcher's limits, or pass --allow-extrapolation.",
            )


def _decode_shape(
    rows: int, longest: int, layers: int, checks: int, checked: int, filled: int, ended: int
) -> StepShape:
    return StepShape(
        rows=rows,
        tokens=rows,
        decode_rows=rows,
        gathered=rows * blocks_for(longest) * BLOCK_TOKENS,
        prefill_rows=0,
        prefill_products=0,
        layers=layers,
        checks=checks,
        checked_rows=checked,
        filled_layers=filled,
        started=0,
        ended=ended,
        longest=longest,
    )
