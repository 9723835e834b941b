"""What people upload is checked and read as data."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
from heliosim_app.question import Question, systems
from heliosim_app.uploads import take_profile, take_trace

from heliosim.errors import InputError
from heliosim.profile_view import shipped_profiles


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def zipped(**files: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as out:
        for name, content in files.items():
            out.writestr(name.replace("__", "/").replace("_json", ".json"), content)
    return held.getvalue()


def test_a_profile_is_taken_over_and_can_be_asked_about() -> None:
    folder = shipped_profiles()["llama2-a100-80gb"]
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as out:
        for file in folder.iterdir():
            out.write(file, f"mine/{file.name}")
    name = take_profile(held.getvalue())
    assert name.startswith("own:")
    assert take_profile(held.getvalue()) == name
    question = Question(models=name)
    assert question.profile().hash
    assert "HELIOS" in systems(name, "A100-80GB")
    assert question.scenario().profile != "llama2-a100-80gb"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"no zip", "cannot be unpacked"),
        (zipped(readme=b"x"), "is no file of a profile"),
        (zipped(run_py=b"import os"), "is no file of a profile"),
        (zipped(a__profile_json=b"{}", b__profile_json=b"{}"), "has a file twice"),
        (zipped(), "has no profile.json"),
        (zipped(profile_json=b"{}"), "profile"),
    ],
)
def test_what_is_no_profile_is_refused_and_leaves_nothing(data: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        take_profile(data)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == []


def test_a_file_that_climbs_out_stays_in(tmp_path: Path) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as out:
        out.writestr("../../profile.json", "{}")
    with pytest.raises(InputError):
        take_profile(held.getvalue())
    assert not list(tmp_path.parent.glob("profile.json"))


def test_a_trace_is_checked(tmp_path: Path) -> None:
    good = b'{"timestamp": 0, "input_length": 10, "output_length": 5}\n'
    path = take_trace("t.jsonl", good)
    assert path.read_bytes() == good
    with pytest.raises(InputError) as caught:
        take_trace("bad.jsonl", b"not json\n")
    assert "bad.jsonl" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
