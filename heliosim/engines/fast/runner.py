"""The fast runner: strides of decode steps on the device, read one step late; prompts in between without waiting.

Mode F (``fixed``) runs all resident layers; ``checked`` does so too and takes tokens at the first confident exit. Mode
S (``segments.py``) parts ways at exits, with a round trip at each. Mode C (``conditional.py``) decides at exits on the
device. What none of them can do is left to the plain runner, step by step (docs/engine.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from heliosim.engines.attention.base import Attention
from heliosim.engines.attention.choose import Choice, choose, table_width
from heliosim.engines.fast.conditional import ConditionalStep, why_not
from heliosim.engines.fast.graphs import Graphs, Ready
from heliosim.engines.fast.lines import Layout
from heliosim.engines.fast.passes import DecodePass, MixedPass
from heliosim.engines.fast.results import Results, StepResult
from heliosim.engines.fast.segments import CapturedWalk, SegmentStep
from heliosim.engines.fast.state import BatchState, bucket_of, buckets_up_to
from heliosim.engines.fast.steps import CheckedStep, FixedStep, Home
from heliosim.engines.fast.stride import Told
from heliosim.engines.models.arena import is_out_of_memory
from heliosim.engines.models.host import Resident
from heliosim.engines.models.walk import Gaps
from heliosim.engines.replayed import ReplayedExits
from heliosim.engines.residency import Residency
from heliosim.engines.running import Done, Runner, is_decoding
from heliosim.engines.sampler import Sampler
from heliosim.engines.texts import Texts
from heliosim.errors import InputError
from heliosim.exits.batching import exit_batcher
from heliosim.exits.skipped import skipped_kv
from heliosim.types import ExitRule, Run, blocks_for

Form = Literal["fixed", "checked", "segments", "conditional"]
_STEPS = {"fixed": FixedStep, "checked": CheckedStep, "conditional": ConditionalStep}
_FIRST_ROWS = 64


class FastRunner(Runner):
    """``attention``: backend by name. ``is_conditional``: mode C where rows stay together. ``lag``: steps that results
    are read behind the one under way (1 on a GPU; on a CPU a step is done when it returns). ``pads``: whether steps
    exist for few numbers of rows only, as graphs need. ``clock``: what strides are timed on.
    """

    def __init__(
        self,
        residency: Residency,
        texts: Texts,
        sampler: Sampler,
        *,
        record_ids: bool,
        attention: str = "auto",
        is_conditional: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        lag: int | None = None,
        pads: bool | None = None,
    ) -> None:
        super().__init__(residency, texts, sampler, record_ids=record_ids)
        self.device = residency.device
        is_cuda = self.device.type == "cuda"
        self.lag = lag if lag is not None else int(is_cuda)
        self.pads = is_cuda if pads is None else pads
        self.is_conditional = is_conditional
        if is_conditional and (reason := why_not(self.device)):
            raise InputError("live.engine", "conditional", reason, "Use fast.")
        self.clock = clock
        self.graphs = Graphs(self.device)
        self.choices: dict[str, Choice] = {
            name: choose(attention, known.kv_shape, self.device, known.dtype) for name, known in residency.hosts.items()
        }
        self._width = blocks_for(max(known.info.positions for known in residency.hosts.values()))
        self._make_room(_FIRST_ROWS)
        self._home: Home | None = None
        self._where: tuple[Any, ...] = ()
        self._eos_ids: dict[str, Tensor] = {}
        self._between: dict[Any, tuple[Tensor, Tensor]] = {}

    def _make_room(self, rows: int) -> None:
        """Have buffers for at least ``rows`` rows."""
        self.state = BatchState(rows, self._width, self.device)
        self.results = Results(self.state)
        self.buckets = buckets_up_to(rows)
        self.graphs.clear()
        self._home = None

    # --- the protocol -----------------------------------------------------------------------------------------------

    def run(self, action: Run) -> Done:
        """One step or a stride."""
        form = self._form(action)
        if form is None:
            return super().run(action)
        self.residency.release(action.evicted)
        if form == "segments":
            if not action.batch.chunks:
                return self._walk(action)
            return self._stride(action, "checked", most=1)
        return self._stride(action, form, most=action.max_steps)

    def _form(self, action: Run) -> Form | None:
        """How a run is done; None: by the plain runner."""
        residency, rule = self.residency, action.exits
        if residency.arrival is not None or action.arriving is not None:
            return None
        if residency.gaps.done or residency.gaps.visible is not None:
            return None
        if rule.kind != "threshold":
            return "fixed"
        method, batcher = skipped_kv(rule.skipped_kv), exit_batcher(rule.batching)
        if method.has_gaps or method.is_recomputed:
            return None
        if action.batch.chunks and is_decoding(action.batch):
            return None  # chunks that decode: rows may stop, and are no decode rows of the state
        if batcher.runs_all:
            return "checked"
        if self.is_conditional and self.replay is None and rule.batching in ("wait-for-deepest", "eager"):
            return "conditional"
        return "segments"

    # --- what steps run on ------------------------------------------------------------------------------------------

    def home(self) -> Home:
        """What steps run on now. Captured steps are good for the addresses they met, and are kept for when those come
        back; others are forgotten with what they ran on.
        """
        resident, kv = self.residency.held()
        where = (
            self.residency.placement,
            kv.total_blocks,
            kv.hidden is None,
            *((layer.tokens.data_ptr(), layer.blocks.shape[0]) for layer in kv.layers),
            *(layer.qkv_weight.data_ptr() for layer in resident.layers),
        )
        if self._home is None or self._where != where or self._home.resident is not resident or self._home.kv is not kv:
            if self.device.type != "cuda":
                self.graphs.clear()
            self._home = Home(resident, kv, self.state, self.sampler, self._eos(resident))
            self._where = where
        return self._home

    def _eos(self, resident: Resident) -> Tensor:
        info = resident.host.info
        if info.spec.name not in self._eos_ids:
            made = torch.tensor(info.eos_ids or (-1,), dtype=torch.int64, device=self.device)
            self._eos_ids[info.spec.name] = made
        return self._eos_ids[info.spec.name]

    def attention(self) -> Attention:
        """The backend of the resident model."""
        assert self.residency.placement is not None
        return self.choices[self.residency.placement.model].attention

    def _bucket(self, rows: int) -> int:
        return bucket_of(rows, self.buckets) if self.pads else rows

    def _span(self, tokens: int) -> int:
        """Width of tables that hold ``tokens`` tokens of the longest row."""
        return min(table_width(tokens), self._width) if self.attention().reads_width else self._width

    def decode_step(self, home: Home, form: Form, rule: ExitRule, rows: int, tokens: int) -> Ready:
        """The step of ``rows`` decode rows whose longest text has ``tokens`` tokens in KV behind it."""
        bucket, width = self._bucket(rows), self._span(tokens)
        of_rule = (rule.batching, rule.skipped_kv, rule.quorum) if form == "conditional" else ()

        def make() -> tuple[Callable[[], None], Any]:
            run = DecodePass(self.state, bucket, width, home.kv, self.attention())
            if form == "conditional":
                return ConditionalStep(home, run, bucket, rule), run
            return _STEPS[form](home, run, bucket), run

        return self.graphs.get((self._where, form, of_rule, bucket, width), make)

    # --- strides ----------------------------------------------------------------------------------------------------

    def _stride(self, action: Run, form: Form, most: int) -> Done:
        self._follow_replay(action)
        home, layout = self.home(), Layout(action, self.texts.going, most)
        if len(layout.lines) > self.state.most:
            self._make_room(max(len(layout.lines), 2 * self.state.most))
            home = self.home()
        kv, steps = home.kv, layout.steps
        layout.take_blocks(kv, steps)
        rows = layout.rows(kv, steps)
        threshold = action.exits.threshold
        if action.guard is not None and action.exits.kind != "threshold":
            threshold = action.guard.watch().threshold
        self.state.upload(rows, layout.decoding_at(0), threshold)
        told = Told(action, layout, self.texts, home.resident.host.info.eos_ids)
        try:
            self._go(action, form, layout, told, home)
        except BaseException:
            self._settle_blocks(layout, told, home)
            raise
        self._settle_blocks(layout, told, home)
        return told.done(record_ids=self.record_ids, is_stride=len(told.steps) > 1)

    def _go(self, action: Run, form: Form, layout: Layout, told: Told, home: Home) -> None:
        """Launch step after step and read what they said, ``lag`` steps behind."""
        mark = self.clock()
        launched, is_over = 0, False
        while not is_over:
            if launched < layout.steps:
                try:
                    self._launch(launched, form, action.exits, layout, home)
                    launched += 1
                except RuntimeError as error:
                    if not launched or not is_out_of_memory(error):
                        raise
                    layout.steps = launched  # the stride ends in front of it, and it is tried again as the first of one
                    if len(told.steps) == launched:
                        break
            if launched - len(told.steps) <= self.lag and launched < layout.steps:
                continue
            emitting = layout.emitting_at(len(told.steps))
            result = self.results.read(emitting)
            if self.replay is not None and emitting:
                result = self._replayed(self.replay, action, layout, result, told)
            now = self.clock()
            is_over = told.add(result if emitting else None, now - mark, home.resident.depth)
            mark = now
        self.results.skip()

    def _follow_replay(self, action: Run) -> None:
        """Give the texts of a stride the lengths that are on record, before it is laid out."""
        if self.replay is None:
            return
        batch = action.batch
        begin = [c.request for chunks in (batch.chunks, *action.program) for c in chunks if c.emits]
        self.replay.follow(action.placement, action.exits, [*batch.decoding, *begin], self.texts.going)

    def _replayed(
        self, replay: ReplayedExits, action: Run, layout: Layout, result: StepResult, told: Told
    ) -> StepResult:
        """A step's results with exits and confidences on record in place of the device's."""
        alive = np.flatnonzero(result.was_alive)
        requests = [layout.lines[i].request for i in alive.tolist()]
        step = replay.step(action.placement, action.exits, requests, self.texts.going)
        left = step.leaving()
        said = step.said(left)
        exit_layers, logprobs = result.exit_layers.copy(), result.logprobs.copy()
        exit_layers[alive], logprobs[alive] = left, said.logprobs
        confidences = np.array(said.confidences, dtype=np.float64)
        return result._replace(
            exit_layers=exit_layers,
            logprobs=logprobs,
            breaches=told.low_before + int((confidences < told.watched).sum()),
            confidences=confidences,
            agrees=np.array(said.agrees, dtype=np.bool_),
        )

    def _launch(self, k: int, form: Form, rule: ExitRule, layout: Layout, home: Home) -> None:
        """Put a step, and the way of its results, into the device's queue."""
        chunks, decoding = layout.reads_at(k), layout.decoding_at(k)
        lengths = [line.length_at(k) for line in layout.lines[:decoding]]
        if chunks:
            self._launch_mixed(k, form, layout, home, lengths)
        else:
            self.state.use(decoding)
            longest = max(line.length_at(layout.steps - 1) for line in layout.lines[:decoding])
            ready = self.decode_step(home, form, rule, decoding, longest)
            if ready.run.is_planned:
                ready.run.plan([home.kv.tables[line.request] for line in layout.lines[:decoding]], lengths)
            self.graphs.capture(ready, self.state)
            ready.go()
        self.work += (decoding + sum(chunk.count for chunk in chunks)) * home.resident.depth
        self.results.push()

    def _launch_mixed(self, k: int, form: Form, layout: Layout, home: Home, lengths: list[int]) -> None:
        decoding, emitting = len(lengths), layout.emitting_at(k)
        rows, ids, emits = layout.chunk_rows(home.kv, k)
        decode = self._decode_rows(home, lengths) if decoding else None
        run = MixedPass(self.state, decode, decoding, rows, ids, emits, home.kv, self.attention())
        if decode is not None and decode.is_planned:
            decode.plan([home.kv.tables[line.request] for line in layout.lines[:decoding]], lengths)
        step = FixedStep if form == "fixed" else CheckedStep
        step(home, run, emitting, run.ends)()

    def _decode_rows(self, home: Home, lengths: list[int]) -> DecodePass:
        """The pass that decode rows of a mixed step attend through."""
        bucket, width = self._bucket(len(lengths)), self._span(max(lengths))

        def make() -> tuple[Callable[[], None], Any]:
            run = DecodePass(self.state, bucket, width, home.kv, self.attention())
            return run.begin, run

        found: DecodePass = self.graphs.get((self._where, "mixed", bucket, width), make).run
        return found

    def _settle_blocks(self, layout: Layout, told: Told, home: Home) -> None:
        """Give back the blocks of those that ended, and of steps that were not done."""
        done = len(told.steps)
        ended = {request for _, request, _ in told.ended}
        self.residency.release(list(ended))
        if self.replay is not None:
            for request in ended:
                self.replay.forget(request)
        for line in layout.lines:
            if line.request in ended:
                continue
            if line.since < done:
                home.kv.trim(line.request, len(line.text.known) - 1)
            else:
                home.kv.trim(line.request, line.position + 1)

    def segment_buffers(self, home: Home) -> tuple[Tensor, Tensor]:
        """Hidden states [most, d] and what rows say [3, most] between segments; the same for all of them."""
        key = (home.resident.host.info.hidden, home.kv.dtype, self.state.most)
        if key not in self._between:
            hidden = torch.zeros(self.state.most, key[0], device=self.device, dtype=home.kv.dtype)
            self._between[key] = hidden, torch.zeros(3, self.state.most, device=self.device, dtype=torch.float64)
        return self._between[key]

    def segment(self, home: Home, rows: int, tokens: int, first: int, last: int) -> Ready:
        """The step of layers ``first`` up to ``last`` for ``rows`` rows."""
        bucket, width = self._bucket(rows), self._span(tokens)
        hidden, said = self.segment_buffers(home)

        def make() -> tuple[Callable[[], None], Any]:
            run = DecodePass(self.state, bucket, width, home.kv, self.attention())
            return SegmentStep(home, run, bucket, first, last, hidden, said), run

        return self.graphs.get((self._where, "segment", first, last, bucket, width), make)

    # --- segments ---------------------------------------------------------------------------------------------------

    def _walk(self, action: Run) -> Done:
        """A step of decode rows that part ways at exits."""
        self._follow_replay(action)
        home, batch = self.home(), action.batch
        layout = Layout(action, self.texts.going, 1)
        if len(layout.lines) > self.state.most:
            self._make_room(2 * len(layout.lines))
            home = self.home()
        layout.take_blocks(home.kv, 1)
        self.state.upload(layout.rows(home.kv, 1), len(layout.lines), action.exits.threshold)
        rows, ids = self._rows(batch, home.kv)
        draws = None if self.sampler.is_greedy else self._seeds(batch)
        walk = CapturedWalk(self, home, Gaps(), action.exits, batch, rows, ids, draws)
        if self.replay is not None:
            walk.replayed = self.replay.step(action.placement, action.exits, batch.emitting, self.texts.going)
        left, layers_run = walk.go()
        self.work += walk.work
        return self._settle(batch, left, layers_run, walk.replayed)
