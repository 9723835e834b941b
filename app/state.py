"""Inputs of all pages, one table: what each is called in a link, its default, its limits and its unit.

An input is drawn by ``draw`` on whatever page needs it; the same key on two pages is the same input. The URL always
says every input that is not at its default, so a link restores it on any page; what a page does not draw goes along.
What a link says and cannot be used is said (``enter``), never dropped in silence.

Streamlit's own ``bind="query-params"`` is not used: in 1.67 a link between two pages loses what both bind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import streamlit as st

Kind = Literal["choice", "number", "whole", "slider", "toggle", "text", "several"]
KEPT, AT, NEW = "_kept", "_at", "_new"


@dataclass(frozen=True)
class Input:
    """One input. ``options``: of a choice, as they stand in links; ``names``: how they are shown, where that differs.
    ``low``, ``high``, ``step``: of numbers, in the unit that the label names. ``digits``: how a number is
    shown, as printf has it.
    """

    key: str
    kind: Kind
    label: str
    default: Any
    options: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    help: str | None = None
    digits: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def default_text(self) -> str:
        return text_of(self, self.default)


INPUTS: dict[str, Input] = {}
"""All inputs by key. Pages add theirs with ``register`` when they are imported."""


def register(*inputs: Input) -> None:
    """Make inputs known. The same key twice must be the same input. Raises ValueError otherwise."""
    for one in inputs:
        if INPUTS.setdefault(one.key, one) != one:
            raise ValueError(f"two inputs are called {one.key!r}")


def text_of(one: Input, value: Any) -> str:
    """A value as it stands in a link."""
    if one.kind == "toggle":
        return "true" if value else "false"
    if one.kind == "several":
        return ",".join(str(v) for v in value or ())
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    return "" if value is None else str(value)


def parse(one: Input, text: str, options: Sequence[str] = ()) -> Any:
    """A value from a link. Raises ValueError saying what is wrong with it."""
    if one.kind == "toggle":
        if text.lower() not in ("true", "false"):
            raise ValueError("is neither true nor false")
        return text.lower() == "true"
    if one.kind == "choice":
        known = tuple(options) or one.options
        if known and text not in known:
            raise ValueError(f"is none of {', '.join(known)}")
        return text
    if one.kind in ("number", "whole", "slider"):
        return _number(one, text)
    if one.kind == "several":
        unknown = [v for v in text.split(",") if v and one.options and v not in one.options]
        if unknown:
            raise ValueError(f"names {unknown[0]}, which is none of {', '.join(one.options)}")
        return [v for v in text.split(",") if v]
    return text


def _number(one: Input, text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is no number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("is no number")
    if (one.low is not None and value < one.low) or (one.high is not None and value > one.high):
        raise ValueError(f"is not between {one.low:g} and {one.high:g}" if one.high else f"is below {one.low:g}")
    if one.kind == "whole":
        if value != int(value):
            raise ValueError("is no whole number")
        return int(value)
    return type(one.default)(value) if isinstance(one.default, int | float) else value


def kept() -> dict[str, Any]:
    """Values of this session by key, also of inputs on other pages."""
    found: dict[str, Any] = st.session_state.setdefault(KEPT, {})
    return found


def value(key: str) -> Any:
    """An input's value without drawing it: this session's (``enter`` puts the link's there), or the default."""
    return kept().get(key, INPUTS[key].default)


def put(changes: Mapping[str, Any]) -> None:
    """Set inputs from code, in a button's callback. Raises KeyError for something that is no input."""
    for key, new in changes.items():
        kept()[INPUTS[key].key] = new
        st.session_state[key] = new


def enter(page: str) -> list[str]:
    """To be called first on every run: where another page was before, or none, take over what the link says, and have
    the page's inputs begin with what is kept. Answers what of the link cannot be used, in words.
    """
    st.session_state[NEW] = st.session_state.get(AT) != page
    st.session_state[AT] = page
    return _take_link() if st.session_state[NEW] else []


def draw(
    key: str,
    *,
    on: Any = None,
    options: Sequence[str] | None = None,
    label: str | None = None,
    help: str | None = None,
    disabled: bool = False,
    on_change: Callable[[], None] | None = None,
) -> Any:
    """Draw an input in ``on`` (a container or column; None: here) and return its value.

    ``options`` narrows a choice to what other inputs leave possible; a value that is no longer possible becomes the
    first of them.
    """
    one, where = INPUTS[key], on or st
    chosen = tuple(options) if options is not None else one.options
    if st.session_state.get(NEW) or key not in st.session_state:
        st.session_state[key] = value(key)
    if one.kind == "choice" and st.session_state[key] not in chosen:
        st.session_state[key] = one.default if one.default in chosen else chosen[0]
    named = {"label": label or one.label, "key": key, "help": help or one.help, "disabled": disabled}
    if on_change is not None:
        named["on_change"] = on_change
    found = _drawn(where, one, named, chosen)
    kept()[key] = found
    return found


def _drawn(where: Any, one: Input, named: dict[str, Any], options: tuple[str, ...]) -> Any:
    """The widget of an input; its value is in the session already."""
    match one.kind:
        case "choice":
            return where.selectbox(options=options, format_func=lambda o: one.names.get(o, o), **named)
        case "several":
            return where.multiselect(options=options, format_func=lambda o: one.names.get(o, o), wrap=True, **named)
        case "toggle":
            return where.toggle(**named)
        case "text":
            return where.text_input(**named)
    as_type = int if one.kind == "whole" or isinstance(one.default, int) else float
    limits = {n: as_type(v) for n, v in (("min_value", one.low), ("max_value", one.high)) if v is not None}
    step = as_type(one.step) if one.step is not None else None
    draw_number = where.slider if one.kind == "slider" else where.number_input
    return draw_number(step=step, format=one.digits, **limits, **named)


def query(**changes: Any) -> dict[str, str]:
    """Every input that is not at its default, and all ``changes``, as a link has them; other pages are opened so.

    Raises KeyError for a change of something that is no input.
    """
    found: dict[str, str] = {}
    for key, new in {**{key: value(key) for key in INPUTS}, **changes}.items():
        one, now = INPUTS[key], new
        if (now == one.default and key not in changes) or now is None:
            continue
        found[key] = text_of(one, now)
    return found


def leave() -> None:
    """To be called last on every run: have the URL say what the inputs are."""
    wanted = query()
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def _take_link() -> list[str]:
    found = []
    for key in st.query_params:
        text = st.query_params[key]
        if key in ("embed", "embed_options"):
            continue
        if key not in INPUTS:
            found.append(f"The link says {key}={text}: no page has such an input, so it counts for nothing.")
            continue
        try:
            kept()[key] = parse(INPUTS[key], text)
        except ValueError as error:
            one = INPUTS[key]
            found.append(f"The link says {key}={text}, which {error}. {one.label} is {one.default_text} instead.")
    return found
