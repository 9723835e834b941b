from __future__ import annotations

import ast
from itertools import islice

import pytest

from heliosim.tasks import FAMILIES, SPLITS, Document, documents, split_of

GENERATED = ("chat", "qa", "arithmetic", "lists", "code")


def first(family: str, split: str, count: int, seed: int = 0) -> list[Document]:
    return list(islice(documents(family, split, seed), count))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_arguments_give_same_documents(family: str) -> None:
    assert first(family, "live", 50, seed=3) == first(family, "live", 50, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_and_split_change_the_documents(family: str) -> None:
    assert first(family, "live", 20, seed=3) != first(family, "live", 20, seed=4)
    assert first(family, "live", 20, seed=3) != first(family, "calibration", 20, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_is_in_two_splits(family: str) -> None:
    prompts = {split: {document.prompt for document in first(family, split, 1500)} for split in SPLITS}
    assert not prompts["train"] & prompts["calibration"]
    assert not prompts["train"] & prompts["live"]
    assert not prompts["calibration"] & prompts["live"]


@pytest.mark.parametrize("family", GENERATED)
def test_a_generated_document_is_in_the_split_of_its_prompt(family: str) -> None:
    for split in SPLITS:
        assert {split_of(document.prompt) for document in first(family, split, 50)} == {split}


def test_about_one_in_twenty_is_held_out_for_each_purpose() -> None:
    splits = [split_of(f"content {i}") for i in range(4000)]
    assert 0.03 < splits.count("calibration") / 4000 < 0.07
    assert 0.03 < splits.count("live") / 4000 < 0.07


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_have_serving_sizes(family: str) -> None:
    some = first(family, "live", 200)
    assert {document.family for document in some} == {family}
    assert all(40 <= len(document.prompt) <= 420 for document in some)
    assert all(30 <= len(document.completion) <= 330 for document in some)
    assert all(document.text == document.prompt + document.completion for document in some)
    assert all(document.prompt == document.prompt.rstrip() for document in some)  # tokens do not straddle the seam


def test_library_text_cycles_without_an_end() -> None:
    some = first("prose", "calibration", 400)
    assert len(some) == 400
    assert len({document.prompt for document in some}) < 400


def test_sums_are_right() -> None:
    for document in first("arithmetic", "live", 100):
        for line in document.completion.strip().split("\n"):
            left, equals, right = line.partition(" = ")
            if equals:
                a, sign, b = left.split()
                assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(right)


def test_lists_keep_their_items() -> None:
    for document in first("lists", "live", 100):
        shown = document.prompt.split("\n")[1:-1]
        for before, after in zip(shown, document.completion.strip().split("\n"), strict=True):
            assert sorted(before.split()) == sorted(after.split())


def test_qa_answers_are_facts_of_the_prompt() -> None:
    for document in first("qa", "live", 100):
        facts = document.prompt.split("\n")[0]
        for answer in document.completion.strip().split("\n"):
            words = answer.removeprefix("- ").removesuffix(".").removesuffix(" food").split()
            assert words[-1] in facts


def test_code_is_python_and_uses_every_field_it_speaks_of() -> None:
    for document in first("code", "live", 200):
        fields = document.prompt.split("# Fields: ")[1].split(".")[0].split(", ")
        used = [field for field in fields if field in document.completion]
        assert used == fields[: len(used)]
        assert len(used) >= 2
        is_method = "    def " in document.completion
        assert _parses(f"{document.prompt}{document.completion}" if is_method else document.completion.strip())


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def test_a_wrong_family_is_named_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown family 'arithmetics'; did you mean 'arithmetic'\? \(known: chat, qa"
    ):
        documents("arithmetics", "train", 0)


def test_a_wrong_split_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown split 'test' \(known: train, calibration, live\)"):
        documents("chat", "test", 0)  # type: ignore[arg-type]
