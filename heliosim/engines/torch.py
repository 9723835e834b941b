"""The live engine: really loads layers, really runs them, and says how long it took.

It keeps what the server must not know (token ids, true lengths: ``texts.py``) and obeys the placements, batches and
block counts it is told: ``residency.py`` does the loads and holds the KV, ``running.py`` the steps. It knows nothing of
objectives, breaches or clocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from heliosim.behaviour import Behaviour
from heliosim.engines.allocator import keep_freed_memory
from heliosim.engines.made_up import MadeUpPrompts
from heliosim.engines.models.host import HostModel
from heliosim.engines.models.ranks import ALONE, Ranks
from heliosim.engines.models.score import SequenceScore, score
from heliosim.engines.parallel.cutting import rank_infos
from heliosim.engines.replayed import ReplayedExits
from heliosim.engines.residency import Residency
from heliosim.engines.running import Done, Runner
from heliosim.engines.sampler import Sampler
from heliosim.engines.texts import Texts
from heliosim.errors import InputError, UnknownNameError
from heliosim.formats.checkpoint import CheckpointInfo, checkpoint_path, inspect_checkpoint
from heliosim.sampling import GREEDY, Sampling
from heliosim.types import Arrival, Load, ModelSpec, Outcome, Placement, RequestId, Run, Tokens, tick

MODES = ("plain", "fast", "conditional")
DEFAULT_STRIDE = 32
"""Steps that a fast engine does at once at most: some tens of milliseconds of a large model between two decisions."""


class TorchEngine:
    """Serves early-exit OPT and Llama checkpoints on one device.

    ``checkpoints``: folder or shipped name by model name; all must share a vocabulary. ``exits``: exit layers by
    model name, in place of the checkpoint's own. ``is_pageable``: host weights are not pinned, on a GPU either.
    ``threads``: CPU threads, set for the whole process. ``record_ids``: report token ids in ``Tokens.ids``.
    ``budget_bytes``: device memory for weights and KV, taken at the first load (0: as much as loads turn out to need).
    ``host_bytes``: host memory for weights, filled with whole models in their order; the rest stays on disk (None: all
    of them are held).
    ``sampling``: how tokens are taken from logits. ``mode``: ``plain`` (step by step), ``fast`` (``fast/``: strides on
    the device) or ``conditional`` (the same, exits decided on the device where rows stay together); ``attention``: the
    backend of the latter two by name.
    ``replay``: a behaviour whose exits stand in for the models' own, with the run's ``seed``. Requests without text get
    made-up prompts under a replay and of random weights.
    ``tensor_parallel``: GPUs of this machine that share each layer, as a ``parallel.engine.ParallelEngine``; ``ranks``:
    the group of which this is one rank.
    """

    def __new__(cls, *_: Any, tensor_parallel: int = 1, **__: Any) -> TorchEngine:
        if cls is TorchEngine and tensor_parallel != 1:
            from heliosim.engines.parallel.engine import ParallelEngine

            return object.__new__(ParallelEngine)
        return object.__new__(cls)

    def __init__(
        self,
        checkpoints: Mapping[str, Path | str],
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        record_ids: bool = True,
        *,
        exits: Mapping[str, Sequence[int]] | None = None,
        is_pageable: bool = False,
        budget_bytes: int = 0,
        host_bytes: int | None = None,
        sampling: Sampling = GREEDY,
        mode: str = "plain",
        attention: str = "auto",
        replay: Behaviour | None = None,
        seed: int = 0,
        tensor_parallel: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        assert tensor_parallel == 1, "several ranks are made by __new__"
        self.device = _device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
            keep_freed_memory()
        chosen = exits or {}
        infos = {
            name: inspect_checkpoint(checkpoint_path(folder), dtype, name=name, exits=chosen.get(name))
            for name, folder in checkpoints.items()
        }
        _require_one_vocabulary(infos)
        if ranks.count > 1:
            infos = rank_infos(infos, ranks.rank, ranks.count)
        is_pinned = self.device.type == "cuda" and not is_pageable
        held = _first_that_fit(infos, host_bytes)
        self.hosts = {
            name: HostModel(info, is_pinned=is_pinned, held=held[name], ranks=ranks) for name, info in infos.items()
        }
        self.specs: dict[str, ModelSpec] = {name: info.spec for name, info in infos.items()}
        self.vocab = min(info.vocab for info in infos.values())
        self.record_ids = record_ids
        self.residency = Residency(self.hosts, self.device, budget_bytes=budget_bytes, is_pinned=is_pinned)
        self.sampling = sampling
        self.texts = Texts()
        is_random = any(info.random is not None for info in infos.values())
        if replay is not None or is_random:
            self.texts.made_up = MadeUpPrompts(seed, self.vocab)
        self.replay = None if replay is None else ReplayedExits(replay, self.specs, seed)
        self.mode = mode
        self.clock: Callable[[], float] = time.perf_counter
        self._runner = self._runner_of(mode, attention, record_ids)
        self._runner.replay = self.replay

    def _runner_of(self, mode: str, attention: str, record_ids: bool) -> Runner:
        if mode not in MODES:
            raise UnknownNameError("live.engine", mode, MODES)
        sampler = Sampler(self.sampling)
        if mode == "plain":
            if attention != "auto":
                remedy = "Use the fast engine, or leave it out."
                raise InputError("live.attention", attention, "the plain engine has one way of its own", remedy)
            return Runner(self.residency, self.texts, sampler, record_ids=record_ids)
        from heliosim.engines.fast.runner import FastRunner

        is_conditional = mode == "conditional"
        return FastRunner(
            self.residency,
            self.texts,
            sampler,
            record_ids=record_ids,
            attention=attention,
            is_conditional=is_conditional,
            clock=lambda: self.clock(),
        )

    def describe(self) -> str:
        """What steps run on, in words: the engine, and the attention that was chosen, with what it was preferred to."""
        choices = getattr(self._runner, "choices", None)
        if choices is None:
            return f"{self.mode} engine"
        choice = next(iter(choices.values()))
        others = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over)
        return f"{self.mode} engine, attention {choice.attention.name}" + (f" ({others})" if others else "")

    @property
    def default_stride(self) -> int:
        """Steps of a stride at most, unless somebody says otherwise."""
        return 1 if self.mode == "plain" else DEFAULT_STRIDE

    # --- the protocol -----------------------------------------------------------------------------------------------

    def accept(self, arrival: Arrival) -> None:
        """Take the content of a request. One longer than the context window is the server's to refuse, not ours."""
        seed = 0 if self.sampling.is_greedy else self.sampling.request_seed(arrival.request.id)
        self.texts.accept(arrival, self.vocab, seed)
        if self.replay is not None:
            self.replay.accept(arrival)

    def perform(self, action: Run | Load) -> Outcome:
        """Do the action; ``Outcome.seconds`` is the wall time it took."""
        began = time.perf_counter()
        with torch.inference_mode():
            if isinstance(action, Load):
                self.residency.load(action)
                done = Done(Tokens(), 0)
            else:
                assert action.placement == self.placement, f"{action.placement} wanted, {self.placement} resident"
                with self.residency.stepping(action):
                    done = self._runner.run(action)
        if self.device.type == "cuda" and (self.mode == "plain" or isinstance(action, Load)):
            torch.cuda.current_stream(self.device).synchronize()
        seconds = tick(time.perf_counter() - began)
        if done.stride is not None:
            seconds = sum(step.seconds for step in done.stride.steps)
        arrives_s, stalled_s = self.residency.arrives_s(action), self.residency.stalled_s(action)
        lost, sums = self.residency.lost_fetch(), done.logprob_sums
        return Outcome(
            seconds, done.tokens, done.layers_run, None, done.stride, sums, done.agrees, arrives_s, stalled_s, lost
        )

    def keep_time(self, clock: Callable[[], float]) -> None:
        """Time the steps of strides on a driver's clock, seconds."""
        self.clock = clock

    def forget(self, request_id: RequestId) -> None:
        """Drop a request, with its KV and its ids."""
        self.texts.going.pop(request_id, None)
        if self.replay is not None:
            self.replay.forget(request_id)
        self.residency.release((request_id,))

    def reset(self) -> None:
        """Hold nothing: no weights, no KV, no requests, no outputs. The next run starts as on an empty device."""
        self.residency.clear()
        self.residency.take_copies()
        self.texts.clear()
        if self.replay is not None:
            self.replay.clear()
        self._runner.work = 0

    def score(self, model: str, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[SequenceScore]:
        """What exits of a model would have said at every position of texts (``models.score``)."""
        return score(self.hosts[model], sequences, layers, self.device)

    def close(self) -> None:
        """End what works for this engine elsewhere; alone, there is nothing."""

    # --- what it holds ----------------------------------------------------------------------------------------------

    def generated(self, request_id: RequestId) -> list[int]:
        """Ids generated for a request so far, or in all if it has ended and its output was not taken."""
        return self.texts.generated(request_id)

    def take_outputs(self) -> dict[RequestId, list[int]]:
        """Ids of the requests that ended since the last call."""
        return self.texts.take_outputs()

    @property
    def outputs(self) -> dict[RequestId, list[int]]:
        """Ids of the requests that ended and were not taken."""
        return self.texts.outputs

    @property
    def work(self) -> int:
        """Tokens x layers run since the last reset, loads apart."""
        return self._runner.work

    @property
    def placement(self) -> Placement | None:
        """What is resident."""
        return self.residency.placement

    def books(self) -> dict[str, int]:
        """Bytes and blocks really held on the device, work buffers apart."""
        return self.residency.books()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError("device", name, "unknown device", "Use cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError("device", name, "unsupported device", "Use cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device", name, "no such device on this machine", "Use cpu.")
    return device


def _first_that_fit(infos: Mapping[str, CheckpointInfo], host_bytes: int | None) -> dict[str, int]:
    """Layers of each model that host memory holds at the start, by the rule of ``serving.loading.HostTier``. Raises
    InputError for random weights that would have to lie on disk.
    """
    left, held = host_bytes, {}
    for name, info in infos.items():
        whole = info.spec.weights_bytes(info.spec.layers)
        fits = left is None or whole <= left
        if not fits and info.random is not None:
            remedy = "Leave memory.host_bytes out, or give room for all models."
            raise InputError("memory.host_bytes", host_bytes, f"{name} is random weights, which lie on no disk", remedy)
        held[name] = info.spec.layers if fits else 0
        if left is not None and fits:
            left -= whole
    return held


def _require_one_vocabulary(infos: Mapping[str, CheckpointInfo]) -> None:
    if not infos:
        raise InputError("checkpoints", {}, "no checkpoint given", "Name at least one.")
    first_name, first = next(iter(infos.items()))
    for name, info in infos.items():
        if info.spec.vocabulary != first.spec.vocabulary:
            problem = f"does not share the vocabulary of {first_name}"
            raise InputError(f"checkpoints: {name}", info.spec.vocabulary, problem, "Serve models with one tokenizer.")
