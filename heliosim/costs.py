"""What a step costs: the shape a step really had, the terms its time is made of, and their fitted coefficients.

The shape is a pure function of the action and its outcome, so calibration (which measures outcomes) and simulation
(which predicts them) describe a step with the same code. The time is a sum of non-negative terms, one for each thing an
engine does: launches per layer, tokens through a layer, KV gathered for decoding, prefill attention, exit checks, KV
filled for skipped layers, and the host's work per step, row, token and request. No term is a product of fitted numbers,
so the fit is linear and every coefficient is a time a reader can check (seconds per unit of the term).

Where the time of a layer's matrix products is known point by point, as in composed profiles, two curves say it instead
of straight lines: one layer's dense work against the tokens of the step, and one output head against the rows it is
given. Their time is added to that of the terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from heliosim.curves import Curve
from heliosim.exits.batching import exit_batcher
from heliosim.types import BLOCK_TOKENS, Arriving, Load, ModelSpec, Outcome, Run, Seconds, Tokens, blocks_for

TERMS: tuple[str, ...] = (
    "step",  # once per step: host loop, scheduling
    "row",  # per row in the batch: host bookkeeping
    "token",  # per token computed: embedding, host lists
    "layer",  # per layer executed: launches
    "layer_many",  # per layer when there is more than one token: matrix instead of vector products
    "layer_token",  # per layer and token, up to 16: matrix products
    "layer_token_more",  # per layer and token beyond 16
    "gathered",  # per KV token looked up for decoding (padded to the longest row): tables and mask
    "layer_decode",  # per layer when decode rows are present: attention launch
    "layer_decode_many",  # per layer when there is more than one decode row: padding and mask
    "layer_decode_row",  # per layer and decode row
    "layer_decode_kv",  # per layer and KV token gathered (padded to the longest row)
    "layer_decode_many_kv",  # the same once more when there is more than one decode row: masked attention is slower
    "layer_prefill_row",  # per layer and prefill chunk: attention launch
    "layer_prefill_kv",  # per layer and token-context product of a chunk
    "check",  # per exit check or final head: launches
    "check_row",  # per row in a check: norm, head, softmax
    "fill_layer",  # per skipped layer whose KV is filled
    "fill_layer_token",  # per skipped layer and token filled
    "started",  # per request that starts (or restarts) in the step
    "ended",  # per request that ends
    "layer_mixed_context",  # the same once more where the step also reads a prompt: kernels that do both are slower
    "layer_decode_context",  # per layer and KV token that decode rows really hold (not padded)
)
HELD_TERMS: frozenset[str] = frozenset({"layer_mixed_context", "layer_decode_context"})
"""Terms of what rows really hold, which an engine that pads KV does not cost."""
LATER_TERMS: frozenset[str] = HELD_TERMS | {"layer_decode_many_kv"}
"""Terms that earlier profiles do not have; there they cost nothing."""

FEW_TOKENS = 16
"""Up to here a token more costs a matrix product something else than beyond."""


class StepShape(NamedTuple):
    """What one step did, in the units its cost is made of. ``gathered``: decode rows x padded KV tokens; ``context``:
    KV tokens that the decode rows really hold behind the step, summed.
    """

    rows: int
    tokens: int
    decode_rows: int
    gathered: int
    prefill_rows: int
    prefill_products: int
    layers: int
    checks: int
    checked_rows: int
    filled_layers: int
    started: int
    ended: int
    longest: int
    context: int = 0

    def terms(self) -> tuple[float, ...]:
        """Values of ``TERMS``, in their order."""
        layers = self.layers
        return (
            1.0,
            self.rows,
            self.tokens,
            layers,
            layers * (self.tokens > 1),
            layers * min(self.tokens, FEW_TOKENS),
            layers * max(0, self.tokens - FEW_TOKENS),
            self.gathered,
            layers * (self.decode_rows > 0),
            layers * (self.decode_rows > 1),
            layers * self.decode_rows,
            layers * self.gathered,
            layers * self.gathered * (self.decode_rows > 1),
            layers * self.prefill_rows,
            layers * self.prefill_products,
            self.checks,
            self.checked_rows,
            self.filled_layers,
            self.filled_layers * self.tokens,
            self.started,
            self.ended,
            layers * self.context * (self.prefill_rows > 0),
            layers * self.context,
        )


def layers_run(run: Run, tokens: Tokens) -> int:
    """Deepest layer a step executes: a batch waits for its deepest token, and a prefill chunk needs every layer."""
    if run.exits.kind != "threshold" or exit_batcher(run.exits.batching).runs_all:
        return run.placement.depth
    if not all(c.is_decode for c in run.batch.chunks):
        return run.placement.depth
    return max(tokens.exit_layers)


def shape_of(run: Run, outcome: Outcome, spec: ModelSpec) -> StepShape:
    """The shape of a step from what was asked and what came out.

    A row of one token that emits is a decode row unless it starts a request; every other row is a prefill chunk. Under
    a threshold each exit up to the last one needed checks the rows that have not left yet.
    """
    batch = run.batch
    decode_rows = len(batch.decoding)
    longest_decode = longest = batch.ticks + max(batch.offsets) + 1 if decode_rows else 0
    context = decode_rows * (batch.ticks + 1) + sum(batch.offsets)
    prefill_rows = products = started = 0
    for chunk in batch.chunks:
        end = chunk.start + chunk.count
        longest = max(longest, end)
        started += chunk.start == 0
        if chunk.is_decode:
            decode_rows += 1
            longest_decode = max(longest_decode, end)
            context += end
        else:
            prefill_rows += 1
            products += chunk.count * end
    exit_layers = outcome.tokens.exit_layers
    emitted = len(outcome.tokens)
    checks, checked = (1, emitted) if emitted else (0, 0)
    filled = 0
    if run.exits.kind == "threshold" and exit_layers:
        checks = checked = 0
        deepest = max(exit_layers)
        for exit_layer in spec.exits:
            undecided = sum(1 for e in exit_layers if e >= exit_layer)
            if exit_layer > deepest or not undecided:
                break
            checks += 1
            checked += undecided
        filled = run.placement.depth - outcome.layers_run
    return StepShape(
        rows=len(batch),
        tokens=batch.tokens,
        decode_rows=decode_rows,
        gathered=decode_rows * blocks_for(longest_decode) * BLOCK_TOKENS,
        prefill_rows=prefill_rows,
        prefill_products=products,
        layers=outcome.layers_run,
        checks=checks,
        checked_rows=checked,
        filled_layers=filled,
        started=started,
        ended=sum(outcome.tokens.lasts),
        longest=longest,
        context=context,
    )


class ExitCosts(NamedTuple):
    """Seconds of what only some exit methods do: preparing a smaller batch in the middle of a step, and copying KV up,
    once per layer and per layer and token.
    """

    regroup: float
    copy_layer: float
    copy_layer_token: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """Fitted seconds per unit of each term, and the region the fit saw.

    ``layer_curve``: seconds of one layer's dense work against the tokens of the step; ``head_curve``: seconds of one
    check or final head against its rows (the mean, where several checks of a step have different numbers). None: the
    terms say it all. ``per_context``: the coefficient of ``layer_decode_context``; ``needs_context``: whether what
    decode rows really hold costs anything, so that no two steps cost the same.

    ``exits``: what only some exit methods cost; None where it was not measured (``exits/pricing.py`` says what stands
    for it).
    """

    coefficients: tuple[float, ...]
    max_rows: int
    max_context: int
    max_tokens: int
    layer_curve: Curve | None = None
    head_curve: Curve | None = None
    exits: ExitCosts | None = None
    per_context: float = field(init=False)
    needs_context: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "per_context", self.coefficients[-1])
        object.__setattr__(self, "needs_context", any(self.coefficients[-2:]))

    def seconds(self, shape: StepShape) -> Seconds:
        """The sum of ``coefficients`` times ``shape.terms()`` and of the curves, written out, with what a layer costs
        summed first and what depends on ``context`` last.
        """
        (
            rows, tokens, decode_rows, gathered, prefill_rows, products, layers, checks, checked, filled, started,
            ended, _longest, context,
        ) = shape  # fmt: skip
        (
            step, row, token, layer, layer_many, layer_token, layer_token_more, per_gathered, layer_decode,
            layer_decode_many, layer_decode_row, layer_decode_kv, layer_decode_many_kv, layer_prefill_row,
            layer_prefill_kv, check, check_row, fill_layer, fill_layer_token, start, end, per_mixed_context,
            per_context,
        ) = self.coefficients  # fmt: skip
        if tokens > FEW_TOKENS:
            in_layer = layer + layer_many + layer_token * FEW_TOKENS + layer_token_more * (tokens - FEW_TOKENS)
        elif tokens > 1:
            in_layer = layer + layer_many + layer_token * tokens
        else:
            in_layer = layer + layer_token * tokens
        if decode_rows:
            in_layer += layer_decode + layer_decode_row * decode_rows + layer_decode_kv * gathered
            if decode_rows > 1:
                in_layer += layer_decode_many + layer_decode_many_kv * gathered
        if prefill_rows:
            in_layer += layer_prefill_row * prefill_rows + layer_prefill_kv * products
            if per_mixed_context:
                in_layer += per_mixed_context * context
        if self.layer_curve is not None:
            in_layer += self.layer_curve.at(tokens)
        total = step + row * rows + token * tokens + per_gathered * gathered + layers * in_layer
        total += check * checks + check_row * checked + start * started + end * ended
        if filled:
            total += filled * (fill_layer + fill_layer_token * tokens)
        if self.head_curve is not None and checks:
            total += checks * self.head_curve.at(checked / checks)
        if per_context:
            total += self.context_seconds(layers, context)
        return total

    def context_seconds(self, layers: int, context: int) -> Seconds:
        """What reading the KV of decode rows adds to a step: the last summand of ``seconds``."""
        return layers * (self.per_context * context)


LOAD_TERMS: tuple[str, ...] = ("load", "layer", "weights_byte", "kv_byte", "extend_token_layer")


def load_terms(load: Load, spec: ModelSpec, resident: int, kv_bytes: int) -> tuple[float, ...]:
    """Values of ``LOAD_TERMS`` for a load that finds ``resident`` layers of the same model (0: another model or none).

    ``kv_bytes``: KV storage allocated behind the new placement.
    """
    depth = load.placement.depth
    new_layers = max(0, depth - resident)
    moved = spec.weights_bytes(depth) - (spec.weights_bytes(resident) if resident else 0)
    extended = sum(tokens for _, tokens in load.kept) * new_layers
    return (1.0, new_layers, max(0, moved), kv_bytes, extended)


def load_seconds(coefficients: Mapping[str, float], terms: tuple[float, ...]) -> Seconds:
    return sum(coefficients[name] * value for name, value in zip(LOAD_TERMS, terms, strict=True))


STEP_SLOWDOWN = "step_slowdown"
"""Key of a step's time beside a transfer over its time alone, where a profile knows it."""

DISK_BYTE = "disk_byte"
"""Key of the seconds per byte that comes from disk, beside ``LOAD_TERMS`` where a run's host memory is bounded."""


def action_seconds(
    coefficients: Mapping[str, float], load: Load, spec: ModelSpec, resident: int, kv_bytes: int
) -> Seconds:
    """What a load takes while no step runs, but for what is waited for (``left_s``).

    A ``whole`` load: everything; if pipelined, all but the transfer of its layers. A ``finish``: all but the transfer.
    The ``begin`` or ``drop`` of a transfer: KV storage allocated anew in its other size.
    """
    once, layers, moved, kv, extended = load_terms(load, spec, resident, kv_bytes)
    if load.part in ("begin", "drop"):
        return coefficients["kv_byte"] * kv
    if load.part == "whole" and not load.is_pipelined:
        terms = (once, layers, moved, kv, extended)
        return load_seconds(coefficients, terms) + _from_disk(coefficients, load)
    seconds = load_seconds(coefficients, (once, 0, 0, kv, extended))
    if load.is_pipelined and not resident:  # no step begins without the embeddings
        seconds += coefficients["weights_byte"] * spec.base_bytes
    return seconds


def transfer_seconds(coefficients: Mapping[str, float], load: Load, spec: ModelSpec, resident: int) -> Seconds:
    """How long the weights of a load are under way; of a pipelined one, those of its layers."""
    _, layers, moved, _, _ = load_terms(load, spec, resident, 0)
    seconds = load_seconds(coefficients, (0, layers, moved, 0, 0)) + _from_disk(coefficients, load)
    if load.is_pipelined and not resident:
        seconds -= coefficients["weights_byte"] * spec.base_bytes
    return max(0.0, seconds)


def _from_disk(coefficients: Mapping[str, float], load: Load) -> Seconds:
    """What bytes cost more because they come from disk; 0 where host memory holds them."""
    if not load.disk_bytes:
        return 0.0
    return load.disk_bytes * max(0.0, coefficients[DISK_BYTE] - coefficients["weights_byte"])


def stall_seconds(whole_s: Seconds, tail_s: Seconds, depth: int, arriving: Arriving) -> Seconds:
    """How much longer a step takes because layers are still arriving, one by one, evenly.

    ``whole_s``: what the step takes with all of them there; ``tail_s``: the part that no layer takes (heads, host),
    which comes last. A layer begins when it is there and the one before it is done. Every resident layer is needed,
    also where tokens leave earlier: skipped layers get their KV. With m layers missing, the step ends c behind the last
    of them or m * c behind the first, whichever is later, where c is what a layer takes.
    """
    missing = depth - arriving.present
    left_s = arriving.left_s
    if not missing or not left_s:
        return 0.0
    per_layer = (whole_s - tail_s) / depth
    last = max(left_s + per_layer, left_s / missing + missing * per_layer) + tail_s
    return max(0.0, last - whole_s)
