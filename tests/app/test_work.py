"""The desk: work in another process, with progress, cancel and memory; errors come back as values."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit")
from heliosim_app.jobs import Mailbox, Trouble, perform
from heliosim_app.work import Desk, keep, key_of, read_kept, trim

from heliosim.errors import InputError

# --- jobs; a worker finds them by name ------------------------------------------------------------------------


def double(number: int, *, report: Any) -> dict[str, int]:
    report(f"doubling {number}", 0.5)
    return {"double": 2 * number, "process": os.getpid()}


def refuse(*, report: Any) -> None:
    raise InputError("rate", -1, "is negative", "Give more.")


def fail(*, report: Any) -> None:
    raise KeyError("nobody expected this")


def forever(*, report: Any) -> None:
    for k in range(10_000):
        report(f"step {k}", 0.01)
        time.sleep(0.02)


def die(*, report: Any) -> None:
    os._exit(3)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(1, tmp_path_factory.mktemp("desk"))
    yield made
    made.close()


def test_work_is_done_elsewhere_once_and_remembered(desk: Desk) -> None:
    first = desk.ask(double, 21, key="double")
    assert first.wait(30)
    assert first.state == "done"
    assert first.value["double"] == 42
    assert first.value["process"] != os.getpid()
    assert desk.ask(double, 21, key="double") is first


def test_plain_data_outlives_the_desk(desk: Desk, tmp_path: Path) -> None:
    ticket = desk.ask(double, 4, key="kept")
    assert ticket.wait(30)
    for _ in range(100):
        if (desk.folder / "kept.json").is_file():
            break
        time.sleep(0.02)
    assert read_kept(desk.folder, "kept") == ticket.value
    desk.forget("kept")
    known = desk.known("kept")
    assert known is not None
    assert known.value == ticket.value


def test_what_a_user_can_correct_is_one_line(desk: Desk) -> None:
    ticket = desk.ask(refuse, key="refuse")
    assert ticket.wait(30)
    assert ticket.state == "failed"
    assert ticket.trouble == Trouble("rate: is negative (value: -1). Give more.", "rate")


def test_the_unexpected_is_kept_for_a_report(desk: Desk) -> None:
    ticket = desk.ask(fail, key="fail")
    assert ticket.wait(30)
    assert ticket.trouble is not None
    assert not ticket.trouble.is_expected
    assert "KeyError" in ticket.trouble.text
    assert "in fail" in ticket.trouble.details


def test_work_says_how_far_it_is_and_can_be_stopped(desk: Desk) -> None:
    ticket = desk.ask(forever, key="forever")
    for _ in range(300):
        if ticket.progress[0]:
            break
        time.sleep(0.05)
    assert ticket.progress[0][0] == "step 0"
    assert ticket.state == "running"
    desk.cancel(ticket)
    assert ticket.wait(30)
    assert ticket.state == "cancelled"
    desk.forget("forever")
    assert desk.known("forever") is None


def test_a_worker_that_dies_is_said_and_the_next_one_works(desk: Desk) -> None:
    ticket = desk.ask(die, key="die")
    assert ticket.wait(30)
    assert ticket.trouble is not None
    assert "worker process ended" in ticket.trouble.text
    after = desk.ask(double, 5, key="after")
    assert after.wait(30)
    assert after.value["double"] == 10


def test_the_folder_stays_small(tmp_path: Path) -> None:
    for k in range(4):
        keep(tmp_path, f"one{k}", {"text": "x" * 1000})
        os.utime(tmp_path / f"one{k}.json", (k, k))
    trim(tmp_path, 2500)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["one2", "one3"]


def test_a_kept_value_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    assert read_kept(tmp_path, "bad") is None


def test_keys_depend_on_every_part() -> None:
    assert key_of("a", {"b": 1}) == key_of("a", {"b": 1})
    assert len({key_of("a"), key_of("b"), key_of("a", 1), key_of("a", {"b": 2})}) == 4


def test_a_job_that_was_stopped_before_it_began_gives_nothing(tmp_path: Path) -> None:
    box = Mailbox(str(tmp_path / "box"))
    box.stop.touch()
    assert perform(forever, (), str(tmp_path / "box")) is None
