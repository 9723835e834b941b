"""The dashboard: navigation only. ``heliosim dashboard`` starts it; each page is a module of ``app/views``.

Nothing is done on import: worker processes import the main script.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class View:
    """A page: module of ``heliosim_app.views`` with a function ``page``, its title, icon and path in the URL."""

    module: str
    title: str
    icon: str
    path: str


VIEWS = (
    View("answer", "Answer", ":material/question_answer:", "answer"),
    View("what_if", "What if", ":material/tune:", "what-if"),
    View("compare", "Compare", ":material/compare_arrows:", "compare"),
    View("timeline", "Timeline", ":material/timeline:", "timeline"),
    View("exits", "Exits", ":material/stairs:", "exits"),
    View("calibration", "Calibration", ":material/verified:", "calibration"),
    View("plan", "Plan", ":material/savings:", "plan"),
    View("live", "Live", ":material/sensors:", "live"),
    View("runs", "Runs", ":material/folder_open:", "runs"),
)  # in the order of the navigation; the first one opens
_KEY = "_pages"


def page_of(path: str) -> Any:
    """The page of a path in this session, or None."""
    import streamlit as st

    return st.session_state.get(_KEY, {}).get(path)


def main(first: str = VIEWS[0].path) -> None:
    """Draw the page the URL asks for, ``first`` if it asks for none."""
    import streamlit as st
    from heliosim_app import inputs, parts, state

    st.set_page_config(
        page_title="HelioSim",
        page_icon=str(Path(__file__).parent / "icon.svg"),
        layout="wide",
        initial_sidebar_state=210,
    )
    inputs.register_all()
    st.html(parts.STYLE)
    modules = {view.path: import_module(f"heliosim_app.views.{view.module}") for view in VIEWS}
    pages = {
        view.path: st.Page(
            parts.guarded(modules[view.path].page),
            title=view.title,
            icon=view.icon,
            url_path=view.path,
            default=view.path == first,
        )
        for view in VIEWS
    }
    st.session_state[_KEY] = pages
    chosen = st.navigation(list(pages.values()), position="hidden")
    for refusal in state.enter(chosen.url_path):
        st.warning(parts.plain(refusal), icon=":material/link_off:")
    links = st.sidebar.container()
    try:
        chosen.run()
    finally:
        _links(links, pages)
        state.leave()


def _links(where: Any, pages: dict[str, Any]) -> None:
    """The navigation, drawn when the page's inputs are known, so that every link carries them."""
    import streamlit as st
    from heliosim_app import state

    carried = state.query()
    with where:
        st.markdown("### :material/wb_sunny: HelioSim")
        for view in VIEWS:
            st.page_link(pages[view.path], query_params=carried, width="stretch")


if __name__ == "__main__":
    main()
