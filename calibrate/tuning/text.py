"""Text to tune on: read, split by content so that nothing held out is ever trained on, cut into windows of ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from heliosim.errors import InputError

HELD_OUT_OF = 10
"""One document in so many is held out."""
_SMALLEST_TOKENS = 256
_REMEDY = "Give more text, in documents separated by blank lines, or JSON Lines with a field text."

Encode = Callable[[str], Sequence[int]]
Windows = list[list[int]]


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, all of one length but the last of each part."""

    train: Windows
    held_out: Windows
    source: str

    @property
    def train_tokens(self) -> int:
        return sum(map(len, self.train))

    @property
    def held_out_tokens(self) -> int:
        return sum(map(len, self.held_out))


def is_held_out(document: str) -> bool:
    """Whether a document is held out: by a hash of its content, so the same text is never on both sides."""
    digest = hashlib.sha256(document.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_OF == 0


def texts_of_file(
    path: Path, encode: Encode, end_ids: Sequence[int], *, length: int, train_tokens: int, held_out_tokens: int
) -> Texts:
    """Windows of ``length`` ids of a file's documents, as many as are asked for at most. Raises InputError."""
    documents = ((document, is_held_out(document)) for document in documents_of(path))
    made = _windows(documents, encode, end_ids, length, train_tokens, held_out_tokens, path.name)
    for part, tokens in (("to train on", made.train_tokens), ("to hold out", made.held_out_tokens)):
        if tokens < _SMALLEST_TOKENS:
            raise InputError(str(path), f"{tokens} tokens", f"too little text {part}", _REMEDY)
    return made


def built_in_texts(
    encode: Encode, end_ids: Sequence[int], *, length: int, train_tokens: int, held_out_tokens: int, seed: int
) -> Texts:
    """The same of the built-in tasks, which have a split of their own."""
    from heliosim.tasks import FAMILIES, documents

    streams = {(f, s): documents(f, s, seed) for f in FAMILIES for s in ("train", "calibration")}
    # as many held-out documents as trained ones until there are enough of them
    turns = cycle([(f, s) for f in FAMILIES for s in ("train", "calibration")])
    given = ((next(streams[turn]).text, turn[1] != "train") for turn in turns)
    return _windows(given, encode, end_ids, length, train_tokens, held_out_tokens, "built-in tasks")


def documents_of(path: Path) -> Iterator[str]:
    """Documents of a text file (separated by blank lines) or of JSON Lines (``text``, or ``prompt`` and
    ``completion``). Raises InputError naming the line.
    """
    if not path.is_file():
        raise InputError("--text", str(path), "no such file", "Give a text file or JSON Lines.")
    with path.open(encoding="utf-8") as lines:
        try:
            yield from _json_documents(path, lines) if path.suffix == ".jsonl" else _paragraphs(lines)
        except UnicodeDecodeError as error:
            raise InputError(str(path), path.name, f"not UTF-8 text: {error.reason}", "Convert it.") from None


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)


def _json_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}", line[:40], f"not JSON: {error.msg}", "Correct it.") from None
        fields = ("text",) if isinstance(row, dict) and "text" in row else ("prompt", "completion")
        found = [row.get(field) for field in fields] if isinstance(row, dict) else [None]
        texts = [value for value in found if isinstance(value, str)]
        if len(texts) < len(found):
            problem = "has neither a text nor a prompt with its completion"
            raise InputError(f"{path}, line {number}", line[:40], problem, "Give each line a field text.")
        yield "".join(texts)


def _windows(
    documents: Iterable[tuple[str, bool]],
    encode: Encode,
    end_ids: Sequence[int],
    length: int,
    train_tokens: int,
    held_out_tokens: int,
    source: str,
) -> Texts:
    """Pack documents one behind the other, each ended by an end-of-text id where the model has one."""
    wanted = {False: train_tokens, True: held_out_tokens}
    ids: dict[bool, list[int]] = {False: [], True: []}
    for document, is_held in documents:
        if len(ids[is_held]) < wanted[is_held]:
            ids[is_held] += [*encode(document), *end_ids[:1]]
        elif all(len(ids[side]) >= wanted[side] for side in ids):
            break
    train, held_out = (_cut(ids[side][: wanted[side]], length) for side in (False, True))
    return Texts(train, held_out, source)


def _cut(ids: list[int], length: int) -> Windows:
    found = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [window for window in found if len(window) > 1]
