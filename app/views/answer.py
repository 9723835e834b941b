"""Answer."""

import streamlit as st
from heliosim_app import asked, state


def page() -> None:
    st.title("Answer")
    asked.draw_who(st)
    state.draw("rate")
    st.write(asked.question())
