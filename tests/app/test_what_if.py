"""The page What if: widgets change the setting, the setting before stays, trouble is said beside its input."""

from __future__ import annotations

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest

from tests.app.helpers import open_page

FEW = {"models": "llama2-small", "device": "H100-80GB", "total": "200", "reps": "2", "rate": "8"}


def tiles(app: AppTest) -> str:
    return " ".join(one.body for one in app.get("html") if 'class="hs-tiles"' in one.body)


def settled(app: AppTest) -> AppTest:
    """The page once its simulation is there."""
    for _ in range(40):
        assert not app.exception
        if tiles(app) or app.error:
            return app
        app.run()
    raise AssertionError("no result")


def slider(app: AppTest, key: str):  # type: ignore[no-untyped-def]
    return next(one for one in app.slider if one.key == key)


def test_it_opens_with_a_result() -> None:
    app = settled(open_page("what-if", **FEW))
    assert not app.error
    assert "TTFT, p99" in tiles(app)
    assert "±" in tiles(app)
    assert any("what was before stays as a ghost" in one.value for one in app.markdown)


def test_a_slider_changes_the_result_and_differences_are_paired() -> None:
    app = settled(open_page("what-if", **FEW))
    before = tiles(app)
    settled(slider(app, "rate").set_value(20.0).run())
    assert tiles(app) != before
    assert any("Changed" in m.value and "8 → 20" in m.value for m in app.markdown)
    assert any("pairs" in list(frame.value.columns) for frame in app.dataframe)
    assert "better" in tiles(app) or "worse" in tiles(app)


def test_going_back_takes_the_setting_before() -> None:
    app = settled(open_page("what-if", **FEW))
    settled(slider(app, "rate").set_value(20.0).run())
    settled(next(b for b in app.button if b.label == "Go back").click().run())
    assert slider(app, "rate").value == 8.0


def test_sliders_rest_where_the_system_has_no_such_parameter() -> None:
    app = settled(open_page("what-if", system="vanilla llama2-7b", **FEW))
    assert [slider(app, key).disabled for key in ("th", "q", "cbc", "ri")] == [True] * 4
    settled(app.selectbox(key="system").set_value("early exit llama2-7b").run())
    assert [slider(app, key).disabled for key in ("th", "q", "cbc", "ri")] == [False, True, True, True]


def test_a_link_restores_every_input() -> None:
    link = {**FEW, "th": "0.6", "q": "0.5", "cbc": "20", "ri": "80", "depth": "llama2-7b@16", "mix": "chat:3,code:1",
            "batch": "32", "memory": "70", "prompt": "100", "output": "60"}  # fmt: skip
    app = settled(open_page("what-if", **link))
    assert [slider(app, key).value for key in ("th", "q", "cbc", "ri")] == [0.6, 0.5, 20, 80]
    assert [slider(app, key).value for key in ("batch", "memory", "prompt", "output")] == [32, 70, 100, 60]
    assert [slider(app, f"mix-{task}").value for task in ("chat", "code", "summarisation")] == [3, 1, 0]
    assert app.selectbox(key="depth").value == "llama2-7b@16"
    assert {k: v for k, v in app.query_params.items() if k in link and k != "device"}.keys() >= {"th", "mix", "depth"}


def test_sliders_of_tasks_make_the_mix() -> None:
    app = settled(open_page("what-if", **FEW))
    settled(slider(app, "mix-code").set_value(2).run())
    assert app.query_params["mix"] in ("code:2", ["code:2"])


def test_trouble_is_said_beside_its_input() -> None:
    app = settled(open_page("what-if", **{**FEW, "mix": "chess:1"}))
    assert any("chess" in error.value for error in app.error)
    assert any(b.label == "Use one task instead" for b in app.button)
    assert not tiles(app)
    short = settled(open_page("what-if", **{**FEW, "reps": "20", "total": "200"}))
    assert any("in each replication" in error.value for error in short.error)
