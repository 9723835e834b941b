"""The repository's tests that need a GPU, on this one; without one, a few that run the same engine on the CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from .book import Book

ROOT = Path(__file__).resolve().parents[2]
CPU_TESTS = "tests/contracts/test_torch_engine.py"
CPU_CHOICE = "test_tokens_equal_generate or test_logits"


def run(book: Book) -> None:
    """Counts of what passed and failed, and the names of what failed."""
    if importlib.util.find_spec("pytest") is None:
        for key in ("failed", "passed"):
            book.cannot(key, "pytest is not installed")
        return
    if not (ROOT / "tests").is_dir():
        for key in ("failed", "passed"):
            book.cannot(key, "there are no tests beside an installed package; run from a checkout")
        return
    folder = ROOT / "tests" / "gpu"
    if book.options.is_gpu and not folder.is_dir():
        for key in ("failed", "passed"):
            book.cannot(key, "there is no tests/gpu in this checkout")
        return
    chosen = [str(folder), "-m", "gpu"] if book.options.is_gpu else [CPU_TESTS, "-k", CPU_CHOICE]
    if not book.options.is_gpu:
        book.note("Tests that need a GPU are not run on a CPU; these are a few that run the same engine.")
    _pytest(book, chosen)


def _pytest(book: Book, chosen: list[str]) -> None:
    results = book.folder / "pytest.xml"
    results.unlink(missing_ok=True)
    known = ["--timeout=120"] if importlib.util.find_spec("pytest_timeout") else []
    settings = ["-o", "addopts=", "-o", "filterwarnings=default"]  # other versions warn of other things
    command = [sys.executable, "-m", "pytest", "-q", *settings, *known, f"--junitxml={results}", *chosen]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(10.0, book.limit_s))
    except subprocess.TimeoutExpired:
        for key in ("failed", "passed"):
            book.cannot(key, f"not through within {book.measure.seconds:.0f} s")
        return
    print(done.stdout[-6000:], done.stderr[-2000:])
    if not results.exists():
        last = (done.stdout + done.stderr).strip().splitlines()
        for key in ("failed", "passed"):
            book.cannot(key, f"pytest ended with code {done.returncode}: {last[-1][:200] if last else ''}")
        return
    failed, passed, skipped = read_results(results)
    book.put("passed", passed)
    book.put("failed", len(failed), note=", ".join(failed[:10]))
    if skipped:
        book.note(f"{skipped} tests were skipped.")


def read_results(file: Path) -> tuple[list[str], int, int]:
    """(names of tests that failed or broke, how many passed, how many were skipped)."""
    failed, passed, skipped = [], 0, 0
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return failed, passed, skipped
