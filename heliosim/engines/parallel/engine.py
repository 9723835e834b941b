"""The engine of a tensor-parallel group as its server sees it: rank 0 in this process, the other ranks in workers."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from heliosim.engines.parallel.cutting import require_ranks
from heliosim.engines.parallel.links import HOST, Linked, Seat
from heliosim.engines.parallel.team import PATIENCE_S, Team, Watch
from heliosim.engines.parallel.worker import held
from heliosim.engines.torch import TorchEngine
from heliosim.errors import HelioSimError, InputError, MemoryBudgetError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint
from heliosim.types import Arrival, Load, Outcome, RequestId, Run, tick

if TYPE_CHECKING:
    from heliosim.engines.models.score import SequenceScore


START_S = 600.0
"""How long workers may take to start, and then to read their weights; one that dies is known at once."""


class ParallelEngine(TorchEngine):
    """``TorchEngine`` over ``tensor_parallel`` GPUs of this machine (CPU: as many processes, for tests).

    Every rank does every action on its part of each layer; ``specs`` and ``books`` are those of one rank.
    ``timeout_s``: how long ranks wait for each other within an action before the run is given up. ``close`` it at the
    end.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Path | str],
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        record_ids: bool = True,
        *,
        tensor_parallel: int,
        timeout_s: float = PATIENCE_S,
        **options: Any,
    ) -> None:
        devices = rank_devices(device, tensor_parallel)
        for name, folder in checkpoints.items():
            require_ranks(inspect_checkpoint(checkpoint_path(folder), dtype, name=name), tensor_parallel)
        wait = timedelta(seconds=timeout_s)
        store = dist.TCPStore(HOST, 0, tensor_parallel, is_master=True, timeout=wait, wait_for_workers=False)
        same = {"dtype": dtype, "threads": threads, "record_ids": record_ids, **options}
        files = {name: str(folder) for name, folder in checkpoints.items()}
        self.team = Team(tensor_parallel, store.port, devices[1:], {**same, "checkpoints": files}, timeout_s)
        self._end = weakref.finalize(self, _end, self.team, linked := _Later())
        try:
            self.team.answers(timeout_s=START_S)  # their imports take a while; meeting then does not
            linked.ranks = Linked(Seat(0, tensor_parallel, store.port, timeout_s), torch.device(devices[0]), store)
            super().__init__(checkpoints, devices[0], ranks=linked.ranks, **same)
        except RuntimeError as error:
            raise self.team.failed(error) from error
        except BaseException:
            self.close()
            raise
        self.team.answers(timeout_s=START_S)
        self._step_s = 0.0
        """Seconds of a step of the last run."""
        self._watch = Watch(self.team, linked.ranks.abort) if self.device.type == "cuda" else None
        linked.watch = self._watch

    # --- the protocol, told to every rank ---------------------------------------------------------------------------

    def accept(self, arrival: Arrival) -> None:
        super().accept(arrival)
        self.team.tell("accept", arrival)

    def perform(self, action: Run | Load) -> Outcome:
        """Do the action on every rank. Raises LostRankError if one is gone, MemoryBudgetError if a load does not fit on
        one; then nothing is loaded on any.
        """
        began = time.perf_counter()
        if isinstance(action, Run):
            action = self._timeless(action)
        self.team.tell("perform", action)
        if self._watch is not None:
            self._watch.begin()
        problem: HelioSimError | None = None
        outcome = Outcome(0.0)
        try:
            outcome = super().perform(action)
        except HelioSimError as error:
            problem = error
        except RuntimeError as error:
            raise self.team.failed(error) from error
        except BaseException:
            self.close()
            raise
        finally:
            if self._watch is not None:
                self._watch.end()
        if isinstance(action, Load):
            self._agree(action, problem)
            outcome = outcome._replace(seconds=tick(time.perf_counter() - began))
        else:
            steps = 1 if outcome.stride is None else len(outcome.stride.steps)
            self._step_s = outcome.seconds / steps
        if problem is not None:
            raise problem
        return outcome

    def _timeless(self, action: Run) -> Run:
        """The same run, ended by a number of steps where a clock would end it: ranks would not read it alike."""
        if action.within_s is None:
            return action
        fitting = int(action.within_s / self._step_s) if self._step_s else 0
        return replace(action, within_s=None, max_steps=max(1, min(action.max_steps, fitting)))

    def _agree(self, action: Load, problem: HelioSimError | None) -> None:
        """Wait for all ranks to have loaded. If they do not hold the same, have them hold nothing and raise."""
        answers = self.team.answers(timeout_s=None if problem is None or not action.kept else 1.0)
        mine = held(self)
        if all(theirs == mine for _, (theirs, _) in answers) and (problem is not None or not _failures(answers)):
            return
        self.residency.clear()
        self.team.tell("drop")
        if problem is None:
            text = _failures(answers)[0] if _failures(answers) else "ranks hold different placements"
            raise MemoryBudgetError("load.kv_blocks", action.kv_blocks, text, "Lower the memory budget.")

    def forget(self, request_id: RequestId) -> None:
        super().forget(request_id)
        if not self.team.is_closed:
            self.team.tell("forget", request_id)

    def reset(self) -> None:
        super().reset()
        self.team.tell("reset")

    def take_outputs(self) -> dict[RequestId, list[int]]:
        self.team.tell("take_outputs")
        return super().take_outputs()

    def score(self, model: str, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[SequenceScore]:
        self.team.tell("score", model, sequences, layers)
        try:
            return super().score(model, sequences, layers)
        except RuntimeError as error:
            raise self.team.failed(error) from error

    def close(self) -> None:
        """End the workers and leave the group. Again: nothing happens."""
        self._end()


def _failures(answers: Sequence[tuple[str, Any]]) -> list[str]:
    return [text for kind, (_, text) in answers if kind == "failed"]


class _Later:
    """What exists only after the workers were started, for the one who ends them."""

    ranks: Linked | None = None
    watch: Watch | None = None


def _end(team: Team, later: _Later) -> None:
    if later.watch is not None:
        later.watch.close()
    team.close()
    if later.ranks is not None:
        later.ranks.close(is_broken=True)


def rank_devices(device: str, ranks: int) -> list[str]:
    """The device of each rank: successive GPUs from ``cuda:N`` on (``cuda``: from the first), or the CPU."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return [device] * ranks
    first = int(number) if number.isdigit() else 0
    there = torch.cuda.device_count()
    if first + ranks > there:
        problem = f"needs {ranks} GPUs from {device} on, but this machine has {there}"
        raise InputError("tensor_parallel", ranks, problem, "Use fewer ranks.")
    return [f"cuda:{first + k}" for k in range(ranks)]
