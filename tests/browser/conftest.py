"""One dashboard and one browser for all tests here; skipped, with the reason, where there is no browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.driving import ARGUMENTS, Driver

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard started by the command, with a cache of its own."""
    pytest.importorskip("streamlit")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cache = tmp_path_factory.mktemp("cache")
    command = [sys.executable, "-m", "heliosim.cli", "dashboard", "--no-browser", "--port", str(port)]
    with (cache / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=cache, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, stdout=log, stderr=log
        )
        try:
            _await(f"http://localhost:{port}/_stcore/health", process, cache / "log.txt")
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait(20)


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            pytest.fail(f"the dashboard ended: {log.read_text()[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the dashboard did not answer: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: on Debian, apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def drive(browser: Any, server: str) -> Iterator[Driver]:
    """A page of a fresh reader. The test fails if the browser's console said an error or anything was fetched from
    elsewhere.
    """
    context = browser.new_context(viewport={"width": 1440, "height": 1000}, accept_downloads=True)
    driver = Driver(context.new_page(), server)
    yield driver
    complaints = driver.complaints
    context.close()
    assert not complaints
