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
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from heliosim.errors import HelioSimError, InputError, UnknownNameError

T = TypeVar("T")
R = TypeVar("R")

KINDS = ("local", "dask", "ray")
TRIES = 3
"""How often an item is started at most, if workers die under it."""

WATCH_S, FORGOTTEN_AFTER = 1.0, 4
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


def _opened(kind: str, jobs: int, address: str | None) -> _Owned:
    if kind == "dask":
        return _DaskExecutor(jobs, address)
    if kind == "ray":
        return _RayExecutor(jobs, address)
    return InlineExecutor() if jobs == 1 else ProcessExecutor(jobs)


class _Owned(Executor):
    """An executor that can give up running work at once. ``width``: items it works on at the same time."""

    width = 1

    def is_idle(self) -> bool:
        """Whether nothing is being worked on although workers are there, as far as this executor can tell."""
        return False

    def abandon(self) -> None:
        self.shutdown(wait=False, cancel_futures=True)


class InlineExecutor(_Owned):
    """Runs each item in this process while it is submitted; an interruption goes straight through."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class ProcessExecutor(_Owned):
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
        with _environment(_ONE_THREAD):  # what a process started now inherits
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


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _absent(package: str, extra: str) -> HelioSimError:
    return HelioSimError(
        f"the {extra} executor needs the package {package}: install it with  pip install 'heliosim[{extra}]'"
    )


class _DaskExecutor(_Owned):
    """Dask's own executor of a client, and the client and cluster that belong to it."""

    def __init__(self, jobs: int, address: str | None) -> None:
        try:
            import dask
            import distributed
        except ModuleNotFoundError:
            raise _absent("distributed", "dask") from None
        self._owned = ExitStack()
        where: Any = address
        if address is None:
            self._owned.enter_context(dask.config.set(_DASK_LOCAL))
            with _interrupts_blocked():  # in the threads and processes of the cluster for good
                where = distributed.LocalCluster(
                    n_workers=jobs, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None,
                    silence_logs=50,
                )  # fmt: skip
            self._owned.callback(where.close)
        try:
            self._client = distributed.Client(where, timeout=10, set_as_default=False)
        except (OSError, ValueError) as error:
            remedy = "Is the scheduler running there? It looks like tcp://host:8786."
            raise InputError("--address", address, f"no Dask scheduler answers ({error})", remedy) from None
        self._owned.callback(self._client.close)
        self.width = max(1, sum(self._client.nthreads().values()))
        self._inner = self._client.get_executor(pure=False)

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        return self._inner.submit(fn, *args, **kwargs)  # type: ignore[no-any-return]

    def is_idle(self) -> bool:
        return bool(self._client.nthreads()) and not any(self._client.processing().values())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._inner.shutdown(wait=wait and not cancel_futures)
        self._owned.close()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; threads and processes started inside never see it."""
    import signal
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or the first process starts it, and that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_DASK_LOCAL = {
    "distributed.scheduler.allowed-failures": 0,  # run_all decides how often work whose worker died is started again
    "distributed.comm.timeouts.connect": "2s",  # a worker on this machine that does not answer is dead
}


class _RayExecutor(_Owned):
    """Tasks of Ray as futures. A Ray that was already started in this process is used and left running."""

    def __init__(self, jobs: int, address: str | None) -> None:
        with _environment(_RAY_QUIET | ({} if address else _RAY_LOOPBACK)):
            try:
                import ray
            except ModuleNotFoundError:
                raise _absent("ray", "ray") from None
            self._ray = ray
            self._owns = not ray.is_initialized()
            if address is not None and not self._owns:
                remedy = "Leave it out to use that one, or shut it down first."
                raise InputError("--address", address, "Ray is already in use in this process", remedy)
            if self._owns:
                _start_ray(ray, jobs, address)
        self.width = max(1, int(ray.cluster_resources().get("CPU", jobs)))
        # max_retries 0: run_all decides how often work whose worker died is started again
        self._remote = ray.remote(num_cpus=1, max_retries=0)(_outcome)
        self._paths = [] if address else list(sys.path)  # as a spawned process gets them
        self._refs: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        import pickle

        future: Future[R] = Future()
        ref = self._remote.remote(self._paths, pickle.dumps((fn, args, kwargs)))
        self._refs[future] = ref
        future.set_running_or_notify_cancel()
        ref.future().add_done_callback(lambda done: self._hand_over(done, future))
        return future

    def _hand_over(self, done: Future[Any], future: Future[Any]) -> None:
        self._refs.pop(future, None)
        error = done.exception()
        succeeded, value = (False, error) if error is not None else done.result()
        if succeeded:
            future.set_result(value)
        else:
            future.set_exception(value)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        refs = list(self._refs.values())
        if cancel_futures:
            for ref in refs:
                self._ray.cancel(ref, force=True)
        elif wait and refs:
            self._ray.wait(refs, num_returns=len(refs))
        if self._owns:
            self._ray.shutdown()


_RAY_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_RAY_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the name is historical: 0 keeps Ray on 127.0.0.1
_RAY_STORE_BYTES = 100 * 2**20  # results are small


def _start_ray(ray: Any, jobs: int, address: str | None) -> None:
    if address is None:
        ray.init(
            address="local", num_cpus=jobs, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=50,
            object_store_memory=_RAY_STORE_BYTES,
        )  # fmt: skip
        return
    try:
        _knock(address.removeprefix("ray://"))  # Ray itself tries for minutes
        ray.init(address=address, log_to_driver=False, logging_level=50)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "Is Ray running there? It looks like host:6379 or ray://host:10001."
        raise InputError("--address", address, f"no Ray answers ({reason})", remedy) from None


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at ``host:port``. Other forms (``auto``) are left to Ray."""
    import socket

    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _outcome(paths: Sequence[str], call: bytes) -> tuple[bool, Any]:
    """(True, result) or (False, exception): Ray would wrap an exception in one of its own."""
    import pickle

    sys.path += [path for path in paths if path not in sys.path]
    try:
        fn, args, kwargs = pickle.loads(call)
        return True, fn(*args, **kwargs)
    except Exception as error:
        return False, error


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
    idle_watches = 0

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
            if idle_watches == FORGOTTEN_AFTER:
                finished = set(running)
                for future in finished:
                    future.cancel()  # then it counts as one whose worker died
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
    return isinstance(executor, _Owned) and executor.is_idle()


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
