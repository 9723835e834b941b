"""Dotted paths and values: what a variation changes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from heliosim.errors import InputError
from heliosim.vary import changed, label, parse_set, short_names

PLAIN: dict[str, Any] = {"seed": 1, "controller": {"kind": "helios", "coverage": 0.5}, "tasks": [{"share": 1}, {}]}


def test_fields_are_set_by_path_in_a_copy() -> None:
    new = changed(PLAIN, {"controller.threshold": 0.9, "tasks.1.share": 2, "slo.ttft_ms": 5, "seed": 3})
    assert new == {
        "seed": 3,
        "controller": {"kind": "helios", "coverage": 0.5, "threshold": 0.9},
        "tasks": [{"share": 1}, {"share": 2}],
        "slo": {"ttft_ms": 5},
    }
    assert PLAIN["tasks"] == [{"share": 1}, {}]


def test_a_mapping_replaces_the_mapping_and_longer_paths_come_after_it() -> None:
    new = changed(PLAIN, {"controller.depth": 2, "controller": {"kind": "fixed"}})
    assert new["controller"] == {"kind": "fixed", "depth": 2}


@pytest.mark.parametrize("path", ["tasks.2.share", "tasks.x", "seed.low"])
def test_a_path_through_nothing_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=f"field {path}: .* it has no"):
        changed(PLAIN, {path: 1})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", [1, 2]),
        ("a.b=0.7,1e-3,1e3", [0.7, 1e-3, 1e3]),
        ("a.b=true,null,x y", [True, None, "x y"]),
        ("a.b=[s],[s,l]", [["s"], ["s", "l"]]),
        ("a.b={kind: fixed, depth: 2},'1,5'", [{"kind": "fixed", "depth": 2}, "1,5"]),
        ("a.b=20 MB", ["20 MB"]),
    ],
)
def test_values_are_read_from_text(text: str, values: list[Any]) -> None:
    assert parse_set(text) == ("a.b", values)


@pytest.mark.parametrize("text", ["a.b", "a.b=", "=1", "a..b=1", "a b=1", "a={x"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_set(text)


def test_labels_are_short_and_tell_apart() -> None:
    assert short_names(["a.rate", "b.rate", "seed", "models.0"]) == {
        "a.rate": "a.rate", "b.rate": "b.rate", "seed": "seed", "models.0": "models.0",
    }  # fmt: skip
    assert label({"controller.threshold": 0.8, "controller": {"kind": "fixed", "depth": 2}}) == (
        "threshold=0.8, controller=fixed(depth=2)"
    )
