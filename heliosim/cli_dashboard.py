"""``heliosim dashboard``: the app of ``app/`` (installed as ``heliosim_app``) in a browser, with settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from heliosim.errors import HelioSimError, InputError

LIGHT: Mapping[str, str] = {
    "primaryColor": "#0072B2",
    "backgroundColor": "#FFFFFF",
    "secondaryBackgroundColor": "#F4F6F8",
    "textColor": "#1F2933",
    "borderColor": "#D5DBE1",
    "linkColor": "#005B8E",
}
DARK: Mapping[str, str] = {
    "primaryColor": "#2A85C7",
    "backgroundColor": "#12161A",
    "secondaryBackgroundColor": "#1B2126",
    "textColor": "#E8ECEF",
    "borderColor": "#37414A",
    "linkColor": "#7CC5F0",
}
UPLOAD_MB = 20


def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "localhost",
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder in which the page Runs looks for run folders.")] = Path(
        "demo/runs"
    ),
) -> None:
    """Open the what-if dashboard in a browser: answers, plans, comparisons, timelines."""
    command = streamlit_command(port=port, host=host, no_browser=no_browser, runs=runs)
    require_free_port(host, port)
    typer.echo(f"HelioSim dashboard on http://{host}:{port} (Ctrl-C ends it)")
    sys.stdout.flush()
    os.execv(command[0], command)


def streamlit_command(*, port: int, host: str, no_browser: bool, runs: Path) -> list[str]:
    """What starts the app. Raises HelioSimError if Streamlit or the app is not installed."""
    if find_spec("streamlit") is None:
        raise HelioSimError("the dashboard needs streamlit: install it with  pip install 'heliosim[app]'")
    settings: dict[str, object] = {
        "server.address": host,
        "server.port": port,
        "server.headless": no_browser,
        "server.fileWatcherType": "none",
        "server.maxUploadSize": UPLOAD_MB,
        "browser.gatherUsageStats": False,
        "runner.magicEnabled": False,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "viewer",
        "theme.font": "sans-serif",
        "theme.baseRadius": "0.5rem",
        **{f"theme.light.{name}": colour for name, colour in LIGHT.items()},
        **{f"theme.dark.{name}": colour for name, colour in DARK.items()},
    }
    flags = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]
    return [sys.executable, "-m", "streamlit", "run", str(main_script()), *flags, "--", "--runs", str(runs)]


def main_script() -> Path:
    """The app's script: of the installed package, else of the clone. Raises HelioSimError if there is neither."""
    installed = find_spec("heliosim_app")
    if installed is not None and installed.submodule_search_locations:
        return Path(next(iter(installed.submodule_search_locations))) / "main.py"
    raise HelioSimError("the dashboard's pages are not installed: run  pip install -e '.[app]'  in the clone")


def require_free_port(host: str, port: int) -> None:
    """Raise InputError if somebody else listens there, or the address is not this machine's."""
    import socket

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise InputError("--host", host, "no such address", "Use localhost, or 0.0.0.0.") from None
    with socket.socket(found[0], found[1]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(found[4])
        except OSError as error:
            problem = f"cannot be used ({error.strerror})"
            raise InputError("--port", port, problem, "Is a dashboard open already? Choose another.") from None
