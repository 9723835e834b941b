"""The progress log of live runs: what is written is what happened; readers meet half lines, strangers and drift."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliosim.errors import InputError
from heliosim.progress_log import LogHeader, LogLine, has_drifted, log_path, read_log, rolling_ratio

HEADER = LogHeader(name="a", clock="cpu", seed=0, scenario_hash="h", scenario="", profile_hash="p")


def line(k: int, ratio: float) -> LogLine:
    return LogLine(
        now_s=k, finished=k, output_tokens=k, running=1, waiting=0, placement="m@2", weights_bytes=1, kv_used_bytes=1,
        kv_total_bytes=2, mean_ttft_s=None, mean_tpot_s=None, steps=k, priced_steps=k, measured_step_s=ratio * k,
        predicted_step_s=k,
    )  # fmt: skip


def test_a_half_last_line_is_left_for_later(tmp_path: Path) -> None:
    path = log_path(tmp_path / "run")
    path.write_text(f"{HEADER.model_dump_json()}\n{line(1, 1).model_dump_json()}\n" + '{"now_s": 2, "fin')
    found = read_log(path)
    assert (found.header, found.lines, found.has_ended) == (HEADER, (line(1, 1),), False)


@pytest.mark.parametrize("text", ["", "{}\n", "no\n", HEADER.model_dump_json() + '\n{"now_s": -1}\n'])
def test_what_is_no_log_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.live.jsonl"
    path.write_text(text)
    with pytest.raises(InputError):
        read_log(path)


def test_a_log_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heliosim.progress_log.MOST_BYTES", 10)
    path = tmp_path / "x.live.jsonl"
    path.write_text(HEADER.model_dump_json() + "\n")
    with pytest.raises(InputError, match="larger"):
        read_log(path)


def test_drift_is_what_the_whole_interval_says() -> None:
    wobble = [0.0, 0.01, -0.01, 0.02]
    alike = [line(k, 1 + wobble[k % 4] / (k + 1)) for k in range(12)]
    slow = [line(k, 1.3 + wobble[k % 4] / (k + 1)) for k in range(12)]
    assert not has_drifted(rolling_ratio(alike))
    assert has_drifted(rolling_ratio(slow))
    assert not has_drifted(rolling_ratio(slow[:2]))  # one interval is no spread
