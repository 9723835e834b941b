"""Clusters as executors: Dask and Ray, started on this machine or reached at an address.

Both listen on the loopback interface only when they are started here. They are imported when an executor is opened.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from heliosim.errors import HelioSimError, InputError

R = TypeVar("R")


class Owned(Executor):
    """An executor that can give up running work at once. ``width``: items it works on at the same time."""

    width = 1

    def is_idle(self) -> bool:
        """Whether nothing is being worked on, as far as this executor can tell."""
        return False

    def recover(self) -> None:
        """Called when it was idle for long although it had work: get workers again where they are ours."""

    def abandon(self) -> None:
        self.shutdown(wait=False, cancel_futures=True)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
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


class DaskExecutor(Owned):
    """Tasks of a Dask client as futures, and the client and cluster that belong to it.

    Not ``Client.get_executor``: where a worker dies between a result and its being fetched, that one reads the state of
    the task anew and takes the result for an error.
    """

    def __init__(self, jobs: int, address: str | None) -> None:
        try:
            import dask
            import distributed
        except ModuleNotFoundError:
            raise _absent("distributed", "dask") from None
        self._dask, self._distributed = dask, distributed
        self._jobs, self._address = jobs, address
        self._open()

    def _open(self) -> None:
        distributed = self._distributed
        self._owned = ExitStack()
        where: Any = self._address
        if self._address is None:
            self._owned.enter_context(self._dask.config.set(_DASK_LOCAL))
            with _interrupts_blocked():  # in the threads and processes of the cluster for good
                where = distributed.LocalCluster(
                    n_workers=self._jobs, threads_per_worker=1, processes=True, host="127.0.0.1",
                    dashboard_address="127.0.0.1:0", silence_logs=50,
                )  # fmt: skip
            self._owned.callback(where.close)
        try:
            self._client = distributed.Client(where, timeout=10, set_as_default=False)
        except (OSError, ValueError) as error:
            remedy = "Is the scheduler running there? It looks like tcp://host:8786."
            raise InputError("--address", self._address, f"no Dask scheduler answers ({error})", remedy) from None
        self._owned.callback(self._client.close)
        self.width = max(1, sum(self._client.nthreads().values()))
        self._tasks: dict[Future[Any], Any] = {}

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        task = self._client.submit(fn, *args, pure=False, **kwargs)
        self._tasks[future] = task
        self._client.loop.add_callback(self._hand_over, task, future)
        return future

    async def _hand_over(self, task: Any, future: Future[Any]) -> None:
        from asyncio import CancelledError as Cancelled

        value: Any = None
        problem: BaseException | None = None
        try:
            value = await task._result()
        except Cancelled:
            problem = CancelledError()
        except Exception as error:
            problem = error
        self._tasks.pop(future, None)
        if not future.set_running_or_notify_cancel():
            return
        if problem is not None:
            future.set_exception(problem)
        else:
            future.set_result(value)

    def is_idle(self) -> bool:
        workers = self._client.nthreads()  # none on a cluster of others: some may come
        return bool(workers or self._address is None) and not any(self._client.processing().values())

    def recover(self) -> None:
        if self._address is None and len(self._client.nthreads()) < self._jobs:
            self._owned.close()
            self._open()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures or not wait:
            self._client.cancel(list(self._tasks.values()), force=True)
        else:
            wait_for(list(self._tasks))
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


class RayExecutor(Owned):
    """Tasks of Ray as futures. A Ray that was already started in this process is used and left running."""

    def __init__(self, jobs: int, address: str | None) -> None:
        with environment(_RAY_QUIET | ({} if address else _RAY_LOOPBACK)):
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
    """(True, result) or (False, exception): Ray would wrap an exception in one of its own.

    ``call`` was pickled a moment ago by the executor that sent it, as every executor of processes does. Nothing is read
    from a file.
    """
    import pickle

    sys.path += [path for path in paths if path not in sys.path]
    try:
        fn, args, kwargs = pickle.loads(call)
        return True, fn(*args, **kwargs)
    except Exception as error:
        return False, error
