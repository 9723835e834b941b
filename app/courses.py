"""What the page Timeline shows: a run of the question at a share of what a server keeps up with, or a run folder."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from heliosim_app.course_jobs import at_load, capacity, quiet_percent
from heliosim_app.question import Question
from heliosim_app.run import one_run
from heliosim_app.work import Ticket, desk, key_of

from heliosim.formats.results import RunResults, load_run, save_run

FOLDER = Path(__file__).parent / "shipped"
DEFAULT_PERCENT = 85


def capacity_ticket(question: Question) -> Ticket:
    """What one server of the question keeps up with; it does not depend on the question's rate."""
    asked = replace(question, rate_per_s=1.0)
    key = key_of("capacity", asdict(asked), asked.profile().hash)
    shipped = shipped_course(DEFAULT_PERCENT) if _is_default(question) else None
    if shipped is not None:
        desk().know(key, {"per_s": shipped[0], "requests": question.requests})
    return desk().ask(capacity, asked, key=key)


def run_ticket(question: Question, per_s: float, percent: float) -> Ticket:
    """A run at a share of what one server keeps up with."""
    asked = at_load(question, per_s, percent)
    key = key_of("course", asked.scenario().hash, asked.profile().hash)
    if _is_default(question):
        shipped = shipped_course(percent)
        if shipped is not None and shipped[1].info.scenario_hash == asked.scenario().hash:
            desk().know(key, shipped[1])
    return desk().ask(one_run, asked, key=key)


def _is_default(question: Question) -> bool:
    return replace(question, rate_per_s=Question().rate_per_s) == Question()


@lru_cache(maxsize=4)
def shipped_course(percent: float) -> tuple[float, RunResults] | None:
    """Capacity in requests/s and the shipped run at a share of it; None if this version has not shipped one, or the
    profile is another.
    """
    from heliosim import __version__

    file = FOLDER / f"course-{percent:g}.tar.gz"
    if not file.is_file():
        return None
    with tempfile.TemporaryDirectory() as held, tarfile.open(file) as packed:
        packed.extractall(held, filter="data")
        run = load_run(Path(held) / "run")
    if run.info.versions.get("heliosim") != __version__ or run.info.profile_hash != Question().profile().hash:
        return None
    return float(run.host["capacity_per_s"]), run


def pack(run: RunResults, file: Path) -> None:
    """Keep a run folder in one file; the same run gives the same bytes."""
    import gzip

    with tempfile.TemporaryDirectory() as held:
        folder = Path(held) / "run"
        save_run(folder, run)
        with (
            _renamed(file) as part,
            gzip.GzipFile(part, "wb", mtime=0) as out,
            tarfile.open(fileobj=out, mode="w") as to,
        ):
            for path in sorted(folder.iterdir()):
                info = tarfile.TarInfo(f"run/{path.name}")
                info.size = path.stat().st_size
                with path.open("rb") as content:
                    to.addfile(info, content)


@contextmanager
def _renamed(file: Path) -> Iterator[Path]:
    part = file.with_suffix(".part")
    yield part
    part.replace(file)


def slimmed(run: RunResults) -> RunResults:
    """The run without tokens of requests that were never preempted: the page looks at no others."""
    import pyarrow.compute as pc

    paused = run.requests.filter(pc.greater(run.requests["preemptions"], 0))["request_id"]
    return replace(run, tokens=run.tokens.filter(pc.is_in(run.tokens["request_id"], value_set=paused)))


def main() -> None:
    """Compute the shipped runs and write them: ``python -m heliosim_app.courses``."""

    def say(text: str, share: float) -> None:
        print(f"\r{100 * share:3.0f} %  {text:40}", end="", flush=True)

    question = Question()
    found: dict[str, Any] = capacity(replace(question, rate_per_s=1.0), report=say)
    for percent in (DEFAULT_PERCENT, quiet_percent(DEFAULT_PERCENT)):
        run = one_run(at_load(question, found["per_s"], percent), report=say)
        file = FOLDER / f"course-{percent:g}.tar.gz"
        pack(replace(slimmed(run), host={"capacity_per_s": found["per_s"]}), file)
        print(f"\r{file.name}: {file.stat().st_size / 1e3:.0f} kB{'':40}")


if __name__ == "__main__":
    main()
