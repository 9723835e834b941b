"""What tests and screenshots do with a page of the dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""A browser without a window that calls nobody."""
PATIENCE_MS = 60_000
SENTENCE = ".hs-sentence"


class Driver:
    """A browser page. ``complaints``: errors on the console, and requests that went elsewhere or failed."""

    def __init__(self, page: Any, server: str) -> None:
        self.page, self.server = page, server
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(f"page: {error}"))
        page.on("request", lambda r: None if self._is_here(r.url) else self.complaints.append(f"elsewhere: {r.url}"))

    def _hear(self, message: Any) -> None:
        """Note an error. Streamlit's own search for its server, which starts below a page's path, is none."""
        if message.type == "error" and "/_stcore/" not in str(message.location.get("url")):
            self.complaints.append(f"console: {message.text}")

    def _is_here(self, url: str) -> bool:
        return url.startswith((self.server, self.server.replace("http", "ws"), "data:", "blob:"))

    def open(self, path: str = "/", wait_for: str = SENTENCE) -> None:
        """Open a link and wait until something stands on the page."""
        self.page.goto(self.server + path)
        self.page.wait_for_selector(wait_for)
        self.settle()

    def settle(self) -> None:
        """Wait until no script runs and no work is waited for."""
        self.page.wait_for_timeout(250)
        self.page.wait_for_function(
            """() => !document.querySelector('[data-testid="stStatusWidget"]')
                && !document.querySelector('[data-testid="stProgress"]')
                && !document.querySelector('[data-stale="true"]')"""
        )
        self.page.wait_for_timeout(250)

    def text(self, selector: str = SENTENCE) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def fill(self, label: str, value: str) -> None:
        """Type into a field and leave it."""
        field = self.page.get_by_label(label, exact=True)
        field.fill(value)
        field.press("Enter")
        self.settle()

    def choose(self, label: str, option: str) -> None:
        """Choose from a list."""
        self.page.get_by_role("combobox", name=label).first.click()
        self.page.get_by_role("option", name=option, exact=True).click()
        self.settle()

    def press(self, label: str) -> None:
        self.page.get_by_role("button", name=label).first.click()
        self.settle()

    def go(self, title: str) -> None:
        """Follow the navigation."""
        self.page.get_by_test_id("stSidebar").get_by_role("link", name=title, exact=True).click()
        self.settle()

    def download(self, label: str, folder: Path) -> Path:
        """Press a download button and keep the file."""
        with self.page.expect_download() as held:
            self.page.get_by_role("button", name=label).first.click()
        target = folder / held.value.suggested_filename
        held.value.save_as(target)
        return target
