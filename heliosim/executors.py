"""Where work runs: this process, local processes, a Dask cluster or Ray, all as ``concurrent.futures.Executor``.

``open_executor`` makes one, ``run_all`` gives it a list of items and survives workers that die. Neither knows what the
work is. A function that is sent away must be importable (top level of a module), its arguments and result picklable.
Results come in any order, so whoever needs an answer that does not depend on the number of workers puts them in theirs.

numpy is not imported here: workers set the number of BLAS threads before it is.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from heliosim.clusters import Owned, environment
from heliosim.errors import HelioSimError, InputError, UnknownNameError

T = TypeVar("T")
R = TypeVar("R")

KINDS = ("local", "dask", "ray")
TRIES = 3
"""How often an item is started at most, if workers die under it."""

WATCH_S, FORGOTTEN_AFTER, FORGOTTEN_AT_MOST = 1.0, 5, 5
"""A cluster that works on nothing for so many looks in a row has forgotten what it was given: a worker that dies with a
result nobody has fetched yet can leave Dask in that state. It is given the work again.
"""

_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class LostWorkError(HelioSimError):
    """Items whose worker died every time. ``indices``: their places in the list."""

    def __init__(self, indices: Sequence[int], tries: int) -> None:
        super().__init__(list(indices), tries)
        self.indices, self.tries = list(indices), tries

    def __str__(self) -> str:
        many = f"{len(self.indices)} pieces of work" if len(self.indices) > 1 else "a piece of work"
        return (
            f"{many} (number {', '.join(str(i) for i in self.indices[:5])}): the worker died {self.tries} times. "
            f"Was it killed, or out of memory? All other work is done; the same command tries these again."
        )


# --- opening ------------------------------------------------------------------------------------------------


@contextmanager
def open_executor(kind: str = "local", jobs: int = 1, address: str | None = None) -> Iterator[Executor]:
    """An executor for the block; closed behind it. If the block fails or is interrupted, running work is given up.

    ``local``: ``jobs`` processes (one: this process itself). ``dask``, ``ray``: ``jobs`` worker processes started on
    this machine, or with ``address`` the cluster there, whose workers are its own business (``jobs`` is not used).

    Raises InputError for a kind, number or address that cannot be used, HelioSimError if a package is not installed.
    """
    if kind not in KINDS:
        raise UnknownNameError("executor", kind, KINDS)
    if jobs < 1:
        raise InputError("jobs", jobs, "must be at least 1", "Give a number of workers.")
    if address is not None and kind == "local":
        raise InputError("address", address, "is of a cluster, the executor is local", "Say dask or ray, or leave it.")
    executor = _opened(kind, jobs, address)
    try:
        yield executor
    except BaseException:
        executor.abandon()
        raise
    executor.shutdown()


def _opened(kind: str, jobs: int, address: str | None) -> Owned:
    if kind == "dask":
        from heliosim.clusters import DaskExecutor

        return DaskExecutor(jobs, address)
    if kind == "ray":
        from heliosim.clusters import RayExecutor

        return RayExecutor(jobs, address)
    return InlineExecutor() if jobs == 1 else ProcessExecutor(jobs)


class InlineExecutor(Owned):
    """Runs each item in this process while it is submitted; an interruption goes straight through."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class ProcessExecutor(Owned):
    """``jobs`` spawned processes. Where the standard pool breaks for good when a worker dies, this one makes a new pool
    for what is submitted next.
    """

    def __init__(self, jobs: int) -> None:
        self.width = jobs
        self._pool = self._new_pool()

    def _new_pool(self) -> Any:
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        return ProcessPoolExecutor(self.width, mp_context=get_context("spawn"), initializer=_start_worker)

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        with environment(_ONE_THREAD):  # what a process started now inherits
            try:
                return self._pool.submit(fn, *args, **kwargs)  # type: ignore[no-any-return]
            except BrokenExecutor:
                self._pool.shutdown(wait=False)
                self._pool = self._new_pool()
                return self._pool.submit(fn, *args, **kwargs)  # type: ignore[no-any-return]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def abandon(self) -> None:
        workers = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _start_worker() -> None:
    """In a new worker: leave Ctrl-C to the parent, and end with it even if it is killed."""
    import multiprocessing
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


# --- running ------------------------------------------------------------------------------------------------


def run_all(
    executor: Executor,
    function: Callable[[T], R],
    items: Sequence[T],
    on_done: Callable[[int, R], None],
    *,
    in_flight: int | None = None,
    tries: int = TRIES,
) -> None:
    """``on_done(index, function(items[index]))`` for every item, once each, in any order, in this thread.

    At most ``in_flight`` items are handed out at a time (default: twice the executor's width). An item whose worker
    died is started again, ``tries`` times in all, the last time alone, so that no other item can be to blame; what is
    lost even then is raised as LostWorkError once everything else is done. An exception of the function itself, or of
    ``on_done``, cancels what has not started and is raised. ``executor`` may be any; one that does not recover from a
    dead worker by itself (the standard process pool) is an error when that happens.
    """
    limit = in_flight or _in_flight(executor)
    waiting, alone = deque(range(len(items))), deque[int]()
    running: dict[Future[R], int] = {}
    deaths = [0] * len(items)
    lost: list[int] = []
    idle_watches = forgotten = 0

    def start(index: int) -> None:
        try:
            running[executor.submit(function, items[index])] = index
        except BrokenExecutor:
            raise HelioSimError("a worker process died and took its pool along; use heliosim's own executors") from None

    try:
        while waiting or alone or running:
            while waiting and len(running) < limit:
                start(waiting.popleft())
            if alone and not running:
                start(alone.popleft())
            finished = wait(running, timeout=WATCH_S, return_when=FIRST_COMPLETED).done
            idle_watches = 0 if finished or not _is_idle(executor) else idle_watches + 1
            forgotten = 0 if finished else forgotten
            if idle_watches == FORGOTTEN_AFTER:
                forgotten, idle_watches = forgotten + 1, 0
                if forgotten > FORGOTTEN_AT_MOST:
                    raise HelioSimError("the cluster works on nothing it is given; look at its workers and their logs")
                for future in running:
                    future.cancel()
                for index in running.values():
                    (alone if deaths[index] == tries - 1 else waiting).appendleft(index)
                running.clear()
                executor.recover()  # type: ignore[attr-defined]
            for future in finished:
                index = running.pop(future)
                error = _error(future)
                if error is None:
                    on_done(index, future.result())
                    continue
                if not _is_death(error):
                    raise error
                deaths[index] += 1
                if deaths[index] >= tries:
                    lost.append(index)
                elif deaths[index] == tries - 1:
                    alone.append(index)
                else:
                    waiting.appendleft(index)
    except BaseException:
        for future in running:
            future.cancel()
        raise
    if lost:
        raise LostWorkError(sorted(lost), tries)


def _is_idle(executor: Executor) -> bool:
    return isinstance(executor, Owned) and executor.is_idle()


def _in_flight(executor: Executor) -> int:
    width = getattr(executor, "width", None) or getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    return 1 if isinstance(executor, InlineExecutor) else 2 * int(width)


def _error(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception()
    except CancelledError as error:  # by a cluster that lost it: nobody here cancels what is waited for
        return error


def _is_death(error: BaseException) -> bool:
    """Whether an item failed because its worker went away, not because of what it is."""
    kinds: list[type[BaseException]] = [BrokenExecutor, CancelledError]
    if "distributed" in sys.modules:
        from distributed.scheduler import KilledWorker

        kinds.append(KilledWorker)
    if "ray" in sys.modules:
        from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

        kinds += [WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError]
    return isinstance(error, tuple(kinds))
