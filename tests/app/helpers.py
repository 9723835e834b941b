"""Opening a page of the dashboard for a test."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).parents[2] / "app" / "main.py"


def open_page(path: str, **link: str) -> AppTest:
    """The app at a page, as a link with these inputs opens it. ``path``: as in the URL."""
    from heliosim_app.main import VIEWS

    view = next(view for view in VIEWS if view.path == path)
    app = AppTest.from_string(
        f"""
        from heliosim_app.main import main
        main({view.path!r})
        """,
        default_timeout=60,
    )
    for key, value in link.items():
        app.query_params[key] = value
    return app.run()
