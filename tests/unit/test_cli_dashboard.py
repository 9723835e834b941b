"""What ``heliosim dashboard`` starts, and what it refuses."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from heliosim import charts, cli_dashboard
from heliosim.cli_dashboard import main_script, require_free_port, streamlit_command
from heliosim.errors import HelioSimError, InputError


def command(**given: object) -> list[str]:
    pytest.importorskip("streamlit")
    return streamlit_command(
        **{"port": 8501, "host": "localhost", "no_browser": True, "runs": Path("runs"), **given}  # type: ignore[arg-type]
    )


def test_the_command_binds_to_localhost_and_tells_nobody() -> None:
    said = command()
    assert said[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert Path(said[4]).name == "main.py"
    assert Path(said[4]).is_file()
    for flag in ("--server.address=localhost", "--browser.gatherUsageStats=false", "--server.fileWatcherType=none"):
        assert flag in said
    assert "--client.showErrorDetails=none" in said
    assert said[-3:] == ["--", "--runs", "runs"]


def test_a_browser_is_opened_unless_told_otherwise() -> None:
    assert "--server.headless=true" in command()
    assert "--server.headless=false" in command(no_browser=False)


def test_every_setting_is_known_to_streamlit() -> None:
    config = pytest.importorskip("streamlit.config")
    known = set(config.get_config_options())
    flags = [flag[2:].partition("=")[0] for flag in command()[5:-3]]
    assert [flag for flag in flags if flag not in known] == []


def test_colours_are_those_of_figures() -> None:
    assert cli_dashboard.LIGHT["primaryColor"] in charts.SYSTEM_PALETTE


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port.*{port}.*another"):
            require_free_port("localhost", port)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="--host"):
        require_free_port("no such host", 8501)


def test_without_streamlit_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_dashboard, "find_spec", lambda name: None)
    with pytest.raises(HelioSimError, match=r"heliosim\[app\]"):
        streamlit_command(port=1, host="localhost", no_browser=True, runs=Path("runs"))
    with pytest.raises(HelioSimError, match="not installed"):
        main_script()
