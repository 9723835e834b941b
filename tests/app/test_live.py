"""Live: shows the newest log, warns of drift, explains what is no log."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
from tests.app.helpers import open_page
from tests.unit.test_progress_log import HEADER, line


@pytest.mark.parametrize(("ratio", "warns"), [(1.0, False), (1.4, True)])
def test_drift_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ratio: float, warns: bool) -> None:
    lines = [line(k, ratio + 0.01 * (k % 2) / (k + 1)).model_copy(update={"has_ended": k == 9}) for k in range(10)]
    text = "\n".join(one.model_dump_json() for one in (HEADER, *lines))
    (tmp_path / "a.live.jsonl").write_text(text + "\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--runs", str(tmp_path)])
    app = open_page("live")
    assert not app.exception
    assert not app.error
    assert any("Drift" in one.value for one in app.warning) is warns


def test_what_is_no_log_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.live.jsonl").write_text("no\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--runs", str(tmp_path)])
    app = open_page("live")
    assert not app.exception
    assert app.error
