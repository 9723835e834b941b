"""Prompts files: what is read, what is passed over, and what is refused with file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from heliosim_calibrate.prompts import Coder, Prompts, prompts_from_file, prompts_from_tasks

from heliosim.errors import InputError
from heliosim.formats.checkpoint import checkpoint_path, inspect_checkpoint

TINY = checkpoint_path("tiny-opt-s")


@pytest.fixture(scope="module")
def coder() -> Coder:
    return Coder(TINY / "tokenizer.json", inspect_checkpoint(TINY, "float32").eos_ids, 96)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_rows_of_every_kind(tmp_path: Path, coder: Coder) -> None:
    rows = (
        {"prompt": "one two", "completion": " three", "task": "count", "id": "first", "is_exact": True},
        {"prompt": "no completion"},
        {"text": "half of this text stands for the prompt and half for what follows"},
    )
    found = prompts_from_file(jsonl(tmp_path / "p.jsonl", *rows), coder, 48)
    first, second, third = found.given
    assert (first.sequence, first.task, first.is_exact) == ("first", "count", True)
    assert coder.decode(first.ids).endswith("one two")
    assert coder.decode(first.reference) == " three"
    assert first.reference[-1] == coder.eos_ids[0], "the end of a text is part of it"
    assert (second.sequence, second.task, second.reference) == ("line-2", "prompts", ())
    assert abs(len(third.ids) - len(third.reference)) <= 1
    assert "half of this text" in coder.decode((*third.ids, *third.reference))


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path, coder: Coder) -> None:
    path = tmp_path / "p.txt"
    path.write_text("the first\n\n  \nthe fourth\r\n", encoding="utf-8")
    found = prompts_from_file(path, coder, 48)
    assert [p.sequence for p in found.given] == ["line-1", "line-4"]
    assert coder.decode(found.given[1].ids).endswith("the fourth")


def test_long_prompts_are_passed_over_and_counted(tmp_path: Path, coder: Coder) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "short"}, {"prompt": "a long one " * 30})
    found = prompts_from_file(path, coder, 20)
    assert ([p.sequence for p in found.given], found.passed_over) == (["line-1"], 1)
    with pytest.raises(InputError, match="holds no prompt of 1 to 2 tokens"):
        prompts_from_file(path, coder, 2)


def test_texts_and_completions_are_cut_to_the_room_there_is(tmp_path: Path, coder: Coder) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"text": "word " * 400}, {"prompt": "a", "completion": " word" * 400})
    cut = prompts_from_file(path, coder, 20).given
    assert [len(p.ids) + len(p.reference) for p in cut] == [96, 96]
    assert len(cut[0].ids) == 20


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: is not JSON"),
        ({"prompts": "a"}, "line 2, field prompts"),
        ({"prompt": "a", "text": "bc"}, "give either prompt or text"),
        ({}, "give either prompt or text"),
        ({"text": "abc", "completion": "d"}, "has no completion of its own"),
        ({"prompt": "a", "is_exact": True}, "is_exact needs a completion"),
        ({"prompt": ""}, "field prompt"),
        ({"prompt": "b", "id": "line-1"}, "stands twice"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, coder: Coder, row: Any, said: str) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"prompt": "good"}, row)
    with pytest.raises(InputError) as refused:
        prompts_from_file(path, coder, 48)
    assert said in str(refused.value)
    assert "p.jsonl" in str(refused.value)


def test_files_that_are_none(tmp_path: Path, coder: Coder) -> None:
    for path, said in (
        (tmp_path / "p.csv", "neither .jsonl nor .txt"),
        (tmp_path / "none.txt", "cannot be read"),
        (jsonl(tmp_path / "empty.jsonl"), "holds no prompts"),
    ):
        with pytest.raises(InputError, match=said):
            prompts_from_file(path, coder, 48)
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        prompts_from_file(tmp_path / "latin.txt", coder, 48)


def test_built_in_prompts_come_with_what_follows(coder: Coder) -> None:
    found = prompts_from_tasks(["qa", "chat"], 3, "calibration", 0, coder, 80)
    assert [p.is_exact for p in found] == [True] * 3 + [False] * 3
    assert all(p.reference for p in found)
    assert [p.sequence for p in Prompts(found).first_of_each(2)] == ["qa-000", "qa-001", "chat-000", "chat-001"]
