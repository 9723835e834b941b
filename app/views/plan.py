"""Plan."""

import streamlit as st
from heliosim_app import asked, state


def page() -> None:
    st.title("Plan")
    state.draw("rate")
    st.write(asked.question())
