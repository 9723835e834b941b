"""Work is done once per item whoever does it, and survives workers that are killed in the middle."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from heliosim.errors import HelioSimError, InputError
from heliosim.executors import LostWorkError, open_executor, run_all
from tests import work


@pytest.mark.parametrize(
    ("kind", "jobs", "address", "said"),
    [
        ("dusk", 2, None, "Did you mean 'dask'"),
        ("local", 0, None, "must be at least 1"),
        ("local", 2, "tcp://127.0.0.1:1", "the executor is local"),
        ("dask", 1, "nowhere", "no Dask scheduler answers"),
        ("ray", 1, "127.0.0.1:1", "no Ray answers"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(kind: str, jobs: int, address: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said), open_executor(kind, jobs, address):
        pass


@pytest.mark.parametrize(("kind", "module"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_named_with_its_extra(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HelioSimError, match=rf"pip install 'heliosim\[{kind}\]'"), open_executor(kind, 2):
        pass


@pytest.fixture(scope="module", params=["local", "dask", "ray"])
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Two worker processes of each kind: a real pool, a real Dask cluster, a real Ray."""
    with open_executor(request.param, 2) as executor:
        yield executor


class Taken(dict[int, Any]):
    """Results by index; a second one for an index is an error."""

    def __call__(self, index: int, result: Any) -> None:
        assert index not in self, f"{index} was done twice"
        self[index] = result


def test_every_item_is_done_once(pool: Executor) -> None:
    taken = Taken()
    run_all(pool, work.square, range(25), taken)
    assert taken == {i: i * i for i in range(25)}


def test_work_is_done_by_two_processes_with_one_blas_thread_each(pool: Executor) -> None:
    taken = Taken()
    run_all(pool, work.threads_and_pid, range(8), taken)
    threads, pids = zip(*taken.values(), strict=True)
    assert set(threads) == {"1"}
    assert len(set(pids) - {os.getpid()}) == 2


def test_a_worker_killed_in_the_middle_loses_nothing_and_repeats_nothing(pool: Executor, tmp_path: Path) -> None:
    taken = Taken()
    run_all(pool, work.die_once, [(i, str(tmp_path)) for i in range(12)], taken)
    assert taken == {i: i * i for i in range(12)}
    assert len(list(tmp_path.glob("3-*"))) >= 2  # it was started, killed, and started again


def test_work_that_kills_its_worker_every_time_is_named_when_all_else_is_done(pool: Executor) -> None:
    taken = Taken()
    with pytest.raises(LostWorkError, match=r"number 2.*died 3 times") as lost:
        run_all(pool, work.die_always, range(6), taken)
    assert lost.value.indices == [2]
    assert taken == {i: i * i for i in (0, 1, 3, 4, 5)}


def test_an_error_of_the_work_arrives_as_it_was_raised(pool: Executor) -> None:
    with pytest.raises(InputError, match="number: is not wanted"):
        run_all(pool, work.refuse, [1, 2, 3], Taken())


def test_one_local_job_runs_in_this_process_and_lets_an_interruption_through() -> None:
    def interrupt(_: int) -> int:
        raise KeyboardInterrupt

    taken = Taken()
    with open_executor("local", 1) as executor:
        run_all(executor, lambda _: os.getpid(), [0, 1], taken)
        with pytest.raises(KeyboardInterrupt):
            run_all(executor, interrupt, [0], taken)
    assert set(taken.values()) == {os.getpid()}


def test_no_more_than_the_given_number_is_handed_out() -> None:
    given: list[int] = []
    most = 0

    def take(index: int, _: int) -> None:
        nonlocal most
        most = max(most, len(given) - len(taken))
        taken(index, 0)

    class Counting(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            given.append(args[0])
            return super().submit(fn, *args, **kwargs)

    taken = Taken()
    with Counting(2) as executor:
        run_all(executor, work.square, range(50), take, in_flight=3)
    assert len(given) == 50
    assert most <= 3


def test_any_executor_will_do_and_one_that_cannot_recover_is_an_error_in_one_line() -> None:
    taken = Taken()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        run_all(executor, work.square, range(3), taken)
        assert taken == {0: 0, 1: 1, 2: 4}
        with pytest.raises(HelioSimError, match="took its pool along"):
            run_all(executor, work.die_always, range(6), lambda i, r: None)
