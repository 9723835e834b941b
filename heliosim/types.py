"""The values that pass between server, engines, drivers and recorders.

All are frozen. Times are seconds on the driver's clock and multiples of ``TICK`` (2**-30 s, about 1 ns), so sums and
differences of times are exact in floating point up to 2**22 s: a simulated and a live driver that saw the same
durations show the same clock to the last bit, in whatever order the additions were done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Seconds = float
Bytes = int
RequestId = int

TICK: Seconds = 2.0**-30
BLOCK_TOKENS = 16
"""Tokens per KV block, the unit in which KV memory is taken and released."""

ExitKind = Literal["none", "threshold", "greedy"]
ExitBatching = Literal["full", "wait-for-deepest"]
InFlight = Literal["boundary", "reprefill", "extend"]
RequestStatus = Literal["finished", "refused"]


def tick(seconds: Seconds) -> Seconds:
    """Round a duration or a time to the clock's resolution."""
    return round(seconds / TICK) * TICK


def blocks_for(tokens: int) -> int:
    """KV blocks that hold ``tokens`` tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Request:
    """What a server may know of a request. The true output length and the text are the engine's (``Content``)."""

    id: RequestId
    arrival_s: Seconds
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Content:
    """What only an engine may know of a request.

    ``output_tokens``: the length to generate whatever the model says (as ``--ignore-eos`` in serving benchmarks);
    None: generation ends at the model's own end-of-sequence token or at ``max_tokens``.
    """

    task: str = ""
    prompt_ids: tuple[int, ...] | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    request: Request
    content: Content


@dataclass(frozen=True, slots=True)
class Placement:
    """Which model is resident and how many of its layers, counted from the input."""

    model: str
    depth: int

    def __str__(self) -> str:
        return f"{self.model}@{self.depth}"


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a token leaves.

    ``none``: at the last resident layer, no confidence asked (vanilla decoding). ``threshold``: at the first exit whose
    confidence reaches ``threshold``, else at the last layer. ``greedy``: every token at the resident depth, confident
    or not (HELIOS step 4). ``batching`` says what a batch under ``threshold`` does: ``full`` runs every layer for every
    row; ``wait-for-deepest`` stops once every row has left.
    """

    kind: ExitKind
    threshold: float = 0.8
    batching: ExitBatching = "wait-for-deepest"


@dataclass(frozen=True, slots=True)
class Directive:
    """A controller's answer: what should be resident, how tokens leave, and what to do with requests in flight.

    ``admit``: how many waiting requests may still start under this directive (None: any number).
    """

    placement: Placement
    exits: ExitRule
    in_flight: InFlight = "boundary"
    admit: int | None = None
    is_probe: bool = False
    reason: str = "serve"


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, as parallel tuples of length B.

    Row i computes ``counts[i]`` tokens of ``requests[i]`` behind the ``starts[i]`` tokens already in its KV; if
    ``emits[i]`` the last of them yields a new token. A decode row has count 1; a prefill chunk may have many.
    """

    requests: tuple[RequestId, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    emits: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True, slots=True)
class Run:
    """Perform one step of ``batch`` on ``placement``. ``evicted``: requests whose KV was given up since the last
    action.
    """

    placement: Placement
    exits: ExitRule
    batch: Batch
    evicted: tuple[RequestId, ...] = ()
    is_probe: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """Make ``placement`` resident, with ``kv_blocks`` KV blocks behind it, and free what is not needed.

    ``kept``: (request, tokens in KV) of requests that go on under the deeper placement of the same model; the engine
    runs the new layers over their stored hidden states (in-flight handling ``extend``).
    """

    placement: Placement
    kv_blocks: int
    reason: str
    stores_hidden: bool = False
    kept: tuple[tuple[RequestId, int], ...] = ()
    evicted: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do until a request arrives."""


Action = Run | Load | Idle


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens emitted by one step, as parallel tuples: one entry for each row that emits, in batch order.

    ``confidences``: maximum softmax probability at the exit the token left by; ``logprobs``: natural-log probability of
    the emitted token at that exit; ``lasts``: the request ends with this token; ``ids``: vocabulary ids when the engine
    has them (a simulated engine has none).
    """

    requests: tuple[RequestId, ...] = ()
    exit_layers: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    logprobs: tuple[float, ...] = ()
    lasts: tuple[bool, ...] = ()
    ids: tuple[int, ...] | None = None
    agrees: tuple[bool, ...] | None = None

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an action did. ``seconds`` is on the driver's clock; ``layers_run`` the deepest layer the step executed."""

    seconds: Seconds
    tokens: Tokens = field(default_factory=Tokens)
    layers_run: int = 0
    energy_j: float | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """What a controller may see of the server before it decides. ``interrupted``: waiting requests that had started."""

    now: Seconds
    placement: Placement | None
    waiting: int
    running: int
    interrupted: int
    weights_bytes: Bytes
    kv_used_bytes: Bytes
    kv_total_bytes: Bytes


@dataclass(frozen=True, slots=True)
class Served:
    """A request that has left the server, with the times a live server would log."""

    id: RequestId
    arrival_s: Seconds
    admitted_s: Seconds | None
    first_token_s: Seconds | None
    finish_s: Seconds
    prompt_tokens: int
    max_tokens: int
    output_tokens: int
    status: RequestStatus
    refusal: str = ""
    preemptions: int = 0
    logprob_sum: float = 0.0
    is_probe: bool = False
    placement: Placement | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of one early-exit model on one device: facts, byte-exact.

    ``base_bytes`` is resident at any depth (embeddings, final norm, output head); ``exit_head_bytes`` what an exit adds
    when it can be used. ``hidden_bytes`` is one token's hidden state. ``kind``: ``fixed`` exits have trained heads;
    ``anywhere`` exits reuse the model's own norm and head.
    """

    name: str
    layers: int
    exits: tuple[int, ...]
    kind: Literal["fixed", "anywhere"]
    layer_bytes: Bytes
    base_bytes: Bytes
    kv_bytes_per_token_layer: Bytes
    hidden_bytes: Bytes
    max_context: int
    vocabulary: str
    exit_head_bytes: Mapping[int, Bytes] = field(default_factory=dict)

    def weights_bytes(self, depth: int) -> Bytes:
        """Bytes of a placement that holds the first ``depth`` layers and the heads of the exits up to there."""
        heads = sum(size for exit_layer, size in self.exit_head_bytes.items() if exit_layer <= depth)
        return self.base_bytes + depth * self.layer_bytes + heads

    def block_bytes(self, depth: int, stores_hidden: bool = False) -> Bytes:
        """Bytes of one KV block over ``depth`` layers, with the exit hidden states kept beside it if asked."""
        hidden = self.hidden_bytes if stores_hidden and depth < self.layers else 0
        return BLOCK_TOKENS * (depth * self.kv_bytes_per_token_layer + hidden)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One row of steps.parquet: an action, when it ran, the state it left; KV in use is what it held meanwhile."""

    start_s: Seconds
    seconds: Seconds
    kind: Literal["run", "load"]
    reason: str
    model: str
    depth: int
    layers_run: int
    rows: int
    decode_rows: int
    prefill_tokens: int
    tokens_out: int
    waiting: int
    running: int
    weights_bytes: Bytes
    kv_used_bytes: Bytes
    kv_total_bytes: Bytes
    breaches: int
    is_probe: bool
    energy_j: float | None
