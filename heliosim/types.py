"""The values that pass between server, engines, drivers and recorders.

Nobody changes a value once it is made. Those made a few times per run are frozen dataclasses; those made for every
request or step are not, because freezing costs more than making them.

Times are seconds on the driver's clock and multiples of ``TICK`` (2**-30 s, about 1 ns), so sums and differences of
times are exact in floating point up to 2**22 s: a simulated and a live driver that saw the same durations show the same
clock to the last bit, in whatever order the additions were done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]
    Bools = npt.NDArray[np.bool_]

Seconds = float
Bytes = int
RequestId = int

TICK: Seconds = 2.0**-30
BLOCK_TOKENS = 16
"""Tokens per KV block, the unit in which KV memory is taken and released."""

ExitKind = Literal["none", "threshold", "greedy"]
ExitBatching = str
"""Name of a rule in ``registry.EXIT_BATCHING``."""
InFlight = Literal["boundary", "reprefill", "extend"]
StepKind = Literal["run", "load", "lost", "fetch"]
LoadPart = Literal["whole", "begin", "finish", "drop"]
RequestStatus = Literal["finished", "refused"]


def tick(seconds: Seconds) -> Seconds:
    """Round a duration or a time to the clock's resolution."""
    return round(seconds / TICK) * TICK


def blocks_for(tokens: int) -> int:
    """KV blocks that hold ``tokens`` tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Prediction:
    """How many tokens somebody expects a request to generate, as told when it arrives; ``predictors`` makes them.

    ``later``: what the predictor will say of it behind every ``every`` tokens, up to ``max_tokens`` whether it comes so
    far or not, so that its length tells nothing.
    """

    tokens: float
    every: int | None = None
    later: tuple[float, ...] = ()

    def total(self, generated: int) -> float:
        """Tokens expected in all once ``generated`` of them are there."""
        if self.every is None or generated < self.every or not self.later:
            return self.tokens
        return self.later[min(generated // self.every, len(self.later)) - 1]


@dataclass(slots=True, unsafe_hash=True)
class Request:
    """What a server may know of a request. The true output length and the text are the engine's (``Content``).

    ``priority``: its class, 0 the most urgent. ``prediction``: of its length; None: nobody made one.
    """

    id: RequestId
    arrival_s: Seconds
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    prediction: Prediction | None = None

    @property
    def predicted_tokens(self) -> float | None:
        """The prediction it arrived with, tokens."""
        return None if self.prediction is None else self.prediction.tokens


@dataclass(slots=True, unsafe_hash=True)
class Content:
    """What only an engine may know of a request.

    ``output_tokens``: the length to generate whatever the model says (as ``--ignore-eos`` in serving benchmarks);
    None: generation ends at the model's own end-of-sequence token or at ``max_tokens``.
    """

    task: str = ""
    prompt_ids: tuple[int, ...] | None = None
    output_tokens: int | None = None


@dataclass(slots=True, unsafe_hash=True)
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
    or not (HELIOS step 4). ``batching`` says what a batch under ``threshold`` does behind an exit, ``skipped_kv`` what
    becomes of the KV of layers that a token skipped (``exits/``). ``quorum``: rows that must have left before ``eager``
    takes the whole batch out; ``break_even``: rows x layers that a regrouping must save before ``rebatch`` does it.
    """

    kind: ExitKind
    threshold: float = 0.8
    batching: ExitBatching = "wait-for-deepest"
    skipped_kv: str = "propagate"
    quorum: int = 1
    break_even: float = 0.0


@dataclass(frozen=True, slots=True)
class Directive:
    """A controller's answer: what should be resident, how tokens leave, and what to do with requests in flight.

    ``admit``: how many waiting requests may still start under this directive (None: any number). ``max_steps``: how
    many steps may be done before the controller is asked again (None: until something happens); ``guard``: what must
    happen; ``max_ends``: how many requests may end before (None: any number); ``passes_arrivals``: whether requests may
    arrive and start before. A controller that asks for more than one step must look at ``Outcome.stride``.
    """

    placement: Placement
    exits: ExitRule
    in_flight: InFlight = "boundary"
    admit: int | None = None
    is_probe: bool = False
    reason: str = "serve"
    max_steps: int | None = 1
    guard: Guard | None = None
    max_ends: int | None = 1
    passes_arrivals: bool = False


@dataclass(slots=True, unsafe_hash=True)
class Chunk:
    """A row that reads ``count`` tokens behind the ``start`` in its KV; ``emits``: the last of them yields another."""

    request: RequestId
    start: int
    count: int
    emits: bool

    @property
    def is_decode(self) -> bool:
        """Whether it is like a decode row: one token, behind others, that yields the next."""
        return self.count == 1 and self.emits and self.start > 0


class Batch:
    """The rows of one step: decode rows, then prefill chunks.

    ``decoding``: requests that compute their newest token and yield the next; the k-th has ``ticks + offsets[k]``
    tokens in its KV. Decoding requests move on together, so a long run of steps changes ``ticks`` and nothing else.

    As parallel tuples of length B: row i computes ``counts[i]`` tokens of ``requests[i]`` behind the ``starts[i]``
    tokens already in its KV; if ``emits[i]`` the last of them yields a new token.
    """

    __slots__ = ("chunks", "decoding", "offsets", "ticks")

    def __init__(
        self,
        requests: tuple[RequestId, ...] = (),
        starts: tuple[int, ...] = (),
        counts: tuple[int, ...] = (),
        emits: tuple[bool, ...] = (),
    ) -> None:
        rows = [Chunk(*row) for row in zip(requests, starts, counts, emits, strict=True)]
        split = next((k for k, row in enumerate(rows) if not row.is_decode), len(rows))
        self.decoding = tuple(requests[:split])
        self.offsets = tuple(starts[:split])
        self.ticks = 0
        self.chunks = tuple(rows[split:])

    @classmethod
    def of(
        cls, decoding: tuple[RequestId, ...], offsets: tuple[int, ...], ticks: int, chunks: tuple[Chunk, ...] = ()
    ) -> Batch:
        """A batch from what a batcher keeps, without touching a row."""
        batch = cls.__new__(cls)
        batch.decoding, batch.offsets, batch.ticks, batch.chunks = decoding, offsets, ticks, chunks
        return batch

    @property
    def requests(self) -> tuple[RequestId, ...]:
        return self.decoding + tuple(c.request for c in self.chunks)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(o + self.ticks for o in self.offsets) + tuple(c.start for c in self.chunks)

    @property
    def counts(self) -> tuple[int, ...]:
        return (1,) * len(self.decoding) + tuple(c.count for c in self.chunks)

    @property
    def emits(self) -> tuple[bool, ...]:
        return (True,) * len(self.decoding) + tuple(c.emits for c in self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return len(self.decoding) + sum(c.count for c in self.chunks)

    @property
    def decode_rows(self) -> int:
        """Rows that compute one token behind others and yield the next."""
        return len(self.decoding) + sum(c.is_decode for c in self.chunks)

    @property
    def emitting(self) -> tuple[RequestId, ...]:
        """Requests that yield a token, in row order."""
        return self.decoding + tuple(c.request for c in self.chunks if c.emits)

    def __len__(self) -> int:
        return len(self.decoding) + len(self.chunks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Batch):
            return NotImplemented
        return all(getattr(self, n) == getattr(other, n) for n in ("requests", "starts", "counts", "emits"))

    def __hash__(self) -> int:
        return hash((self.requests, self.starts))

    def __repr__(self) -> str:
        return f"Batch({self.requests}, {self.starts}, {self.counts}, {self.emits})"


class Guard(Protocol):
    """A controller's wish to be asked again: when, within a run of steps, it must decide.

    A pure function: it may be shown steps that are not done in the end, and must remember nothing of them.
    """

    def first_trip(self, confidences: Floats, ends: Ints) -> int | None:
        """Index of the first step behind which to stop; None: none of them.

        confidences: [tokens] of all steps, in order; ends: [steps], how many tokens there are up to each step's end.
        """
        ...

    def watch(self) -> Watch:
        """The same for steps that are shown bit by bit."""
        ...


class Watch(Protocol):
    """A guard that is shown steps bit by bit and remembers them.

    ``threshold``: tokens below this confidence are those it minds.
    """

    threshold: float

    def is_safe(self, low: int) -> bool:
        """Whether steps with ``low`` tokens below the threshold cannot trip it; if so they need not be shown yet."""
        ...

    def first_trip(self, confidences: Floats, ends: Ints) -> int | None:
        """As ``Guard.first_trip``, of all steps behind those shown to this method before."""
        ...


@dataclass(frozen=True, slots=True)
class Arriving:
    """Layers of the resident placement whose weights are still on their way: those behind ``present`` ones, evenly over
    the next ``left_s`` seconds (None: only the engine knows).
    """

    present: int
    left_s: Seconds | None


@dataclass(slots=True, unsafe_hash=True)
class Run:
    """Perform ``batch`` on ``placement``. ``evicted``: requests whose KV was given up since the last action.

    An engine may go on for ``max_steps`` steps in all. ``program``: the chunks of the steps behind the first one, as
    long as requests read their prompts and nobody's end makes room to read faster; who has read all decodes from the
    next step on. Then only decode rows are left, one token further each step. The run ends early behind the first step
    that ends the ``max_ends``-th request (None: any number may end; in front of a chunk any end counts), that lasts
    to ``within_s`` from its start (an arrival), or that trips the guard. An engine may always do fewer steps.
    ``in_stride``: whoever asked looks at strides; a simulated engine then answers with one, if only of one step.
    ``is_slowed``: weights are under way beside it, and somebody knows what that costs; such a run is one step.
    ``arriving``: what of the placement is not there yet; such a run is one step, which waits where it must.
    """

    placement: Placement
    exits: ExitRule
    batch: Batch
    evicted: tuple[RequestId, ...] = ()
    is_probe: bool = False
    max_steps: int = 1
    within_s: Seconds | None = None
    guard: Guard | None = None
    program: tuple[tuple[Chunk, ...], ...] = ()
    max_ends: int | None = 1
    in_stride: bool = False
    arriving: Arriving | None = None
    is_slowed: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """Make ``placement`` resident, with ``kv_blocks`` KV blocks behind it, and free what is not needed.

    ``kept``: (request, tokens in KV) of requests that go on under the deeper placement of the same model; the engine
    runs the new layers over their stored hidden states (in-flight handling ``extend``).

    ``part``: ``whole``, or the ``begin`` of a transfer in the background (what is resident stays and goes on, with
    ``kv_blocks`` blocks behind it), its ``finish`` (whatever is missing is waited for, ``left_s`` seconds if the server
    knows, and the placement changes), or ``drop``: what has been fetched is given up, nothing changes but the blocks.
    ``is_pipelined``: steps may begin before all layers are there. ``disk_bytes``: of the weights that move, those that
    come from disk; ``host``: (model, layers) that host memory holds behind it, None: everything.
    """

    placement: Placement
    kv_blocks: int
    reason: str
    stores_hidden: bool = False
    kept: tuple[tuple[RequestId, int], ...] = ()
    evicted: tuple[RequestId, ...] = ()
    part: LoadPart = "whole"
    left_s: Seconds | None = None
    is_pipelined: bool = False
    disk_bytes: Bytes = 0
    host: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to do until a request arrives."""


Action = Run | Load | Idle


@dataclass(slots=True, unsafe_hash=True)
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


class StrideTokens(Protocol):
    """Tokens of a stride's steps in order, within a step in batch order; arrays [tokens], made when asked for.

    What is read must be read before the engine acts again.
    """

    @property
    def requests(self) -> Ints: ...
    @property
    def exit_layers(self) -> Ints: ...
    @property
    def confidences(self) -> Floats: ...
    @property
    def logprobs(self) -> Floats: ...


class StrideStep(NamedTuple):
    """One step of a stride. Steps that are alike may be one object, named several times."""

    seconds: Seconds
    layers_run: int
    rows: int
    decode_rows: int
    prefill_tokens: int
    tokens_out: int


class StepPower(NamedTuple):
    """Mean power of all GPUs of a server while it does something with a model, W.

    A step that reads and decodes draws the two powers in the proportion of its tokens.
    """

    decode_w: float
    prefill_w: float
    load_w: float

    def joules(self, seconds: Seconds, decode_rows: int, prefill_tokens: int) -> float:
        """Energy of a step."""
        if not prefill_tokens:
            return self.decode_w * seconds
        share = prefill_tokens / (prefill_tokens + decode_rows)
        return (self.decode_w + (self.prefill_w - self.decode_w) * share) * seconds

    def of(self, step: StrideStep) -> float:
        """Energy of a stride's step, J."""
        return self.joules(step[0], step[3], step[4])


@dataclass(slots=True, eq=False)
class Stride:
    """Several steps done in one go.

    ``ended``: (step, request, sum of its tokens' natural-log probabilities), in order of time. ``watts``: the power
    during the steps; None: unknown. ``tokens``: None from an engine that knows of no behaviour.
    """

    steps: list[StrideStep]
    ended: list[tuple[int, RequestId, float]]
    watts: StepPower | None = None
    tokens: StrideTokens | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def token_ends(self) -> Ints:
        """How many tokens there are up to each step's end, [steps]."""
        import numpy as np

        return np.add.accumulate(np.array([step[5] for step in self.steps]))


_NO_TOKENS = Tokens()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine did not do an action. It can be asked for another: what it had resident is gone, unless
    ``is_intact``.

    ``memory``: the device has less than was asked for; a run of fewer rows may do, or a load in ``available_bytes`` for
    weights and KV (None: unknown). ``load``: weights did not come. ``fetch``: a transfer beside steps came to nothing;
    the action itself was done.
    """

    what: Literal["load", "memory", "fetch"]
    problem: str
    is_intact: bool = False
    available_bytes: Bytes | None = None


class Outcome(NamedTuple):
    """What an action did. ``seconds`` is on the driver's clock; ``layers_run`` the deepest layer the step executed.

    ``stride``: the steps, if there were several; ``tokens`` is empty then, ``seconds`` and ``energy_j`` are sums over
    all. ``logprob_sums``: of the requests that ended with the step, where the engine keeps count. ``agrees``: makes
    [tokens] of a stride, whether the full model would have said the same, which only a simulated engine knows.
    ``arrives_s``: seconds from the end of the action until the weights under way are there, below 0 if they have been
    for some time; None: nothing new is known of them. ``stalled_s``: part of the seconds in which a step waited for
    layers to arrive. ``failure``: the action was not done, or a transfer beside it failed; only live engines fail.
    """

    seconds: Seconds
    tokens: Tokens = _NO_TOKENS
    layers_run: int = 0
    energy_j: float | None = None
    stride: Stride | None = None
    logprob_sums: Mapping[RequestId, float] | None = None
    agrees: Callable[[], Bools] | None = None
    arrives_s: Seconds | None = None
    stalled_s: Seconds = 0.0
    failure: Failure | None = None


class Status(Protocol):
    """What a controller may see of the server before it decides, true until it acts.

    ``interrupted``: waiting requests that had started.
    """

    @property
    def now(self) -> Seconds: ...
    @property
    def placement(self) -> Placement | None: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def interrupted(self) -> int: ...
    @property
    def weights_bytes(self) -> Bytes: ...
    @property
    def kv_used_bytes(self) -> Bytes: ...
    @property
    def kv_total_bytes(self) -> Bytes: ...


@dataclass(slots=True, unsafe_hash=True)
class Served:
    """A request that has left the server, with the times a live server would log.

    ``recomputed_tokens``: tokens whose KV was given up with a preemption, to be computed again.
    """

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
    priority: int = 0
    predicted_tokens: float | None = None
    recomputed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of one early-exit model on one device: facts, byte-exact.

    ``base_bytes`` is resident at any depth (embeddings, final norm, output head); ``exit_head_bytes`` what an exit adds
    when it can be used. ``hidden_bytes`` is one token's hidden state. ``kind``: ``fixed`` exits have trained heads;
    ``anywhere`` exits reuse the model's own norm and head. ``request_bytes``: what every request in memory needs beside
    its KV, whatever its length.
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
    request_bytes: Bytes = 0

    def weights_bytes(self, depth: int) -> Bytes:
        """Bytes of a placement that holds the first ``depth`` layers and the heads of the exits up to there."""
        heads = sum(size for exit_layer, size in self.exit_head_bytes.items() if exit_layer <= depth)
        return self.base_bytes + depth * self.layer_bytes + heads

    def block_bytes(self, depth: int, stores_hidden: bool = False) -> Bytes:
        """Bytes of one KV block over ``depth`` layers, with the exit hidden states kept beside it if asked."""
        hidden = self.hidden_bytes if stores_hidden and depth < self.layers else 0
        return BLOCK_TOKENS * (depth * self.kv_bytes_per_token_layer + hidden)

    def request_blocks(self, depth: int, stores_hidden: bool = False) -> int:
        """KV blocks that stand for ``request_bytes``: whole ones, rounded up."""
        return -(-self.request_bytes // self.block_bytes(depth, stores_hidden)) if self.request_bytes else 0


class StepRecord(NamedTuple):
    """One row of steps.parquet: an action, when it ran, the state it left; KV in use is what it held meanwhile.

    ``lost``: a replica failed during the action (or idle, in no time); bytes are those held until then. ``fetch``: a
    transfer in the background began or was given up; the seconds are those in which no step could run.
    """

    start_s: Seconds
    seconds: Seconds
    kind: StepKind
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


class Setting(NamedTuple):
    """What stays the same over many steps."""

    model: str
    depth: int
    weights_bytes: Bytes
    kv_total_bytes: Bytes
    is_probe: bool


class StrideRecord(NamedTuple):
    """Rows of steps.parquet, and of tokens.parquet, for the n steps of a stride; the lists have n entries each.

    ``kv_blocks``: in use during a step, of ``block_bytes`` each; ``running``: requests that run behind it.
    """

    start_s: Seconds
    stride: Stride
    setting: Setting
    waiting: list[int]
    running: list[int]
    kv_blocks: list[int]
    block_bytes: Bytes
    breaches: Sequence[int]
    agrees: Callable[[], Bools] | None
