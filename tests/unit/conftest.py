"""What several test files share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heliosim.cli import main
from heliosim.console import console

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Run ``heliosim`` with arguments in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["heliosim", *map(str, arguments)])
        capfd.readouterr()
        console.cache_clear()  # its width is that of the first test
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run
