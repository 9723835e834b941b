"""Task families of different difficulty: the text that the tiny checkpoints are trained on and served with.

Five families are generated (chat, qa, arithmetic, lists, code) and one is read from the docstrings of the standard
library of the running interpreter (prose). A document is a prompt and the completion that belongs to it; the text of a
document is `prompt + completion`, with no separator between them.

Splits are disjoint by content: a document belongs to the split that the hash of its prompt says (generated
families) or that the hash of its whole docstring says (prose). The hash does not depend
on the Python version, but the standard library does: another version offers partly other functions, and a
docstring that changed between versions may change its split.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "calibration", "live"]

FAMILIES: tuple[str, ...] = ("chat", "qa", "arithmetic", "lists", "code", "prose")
SPLITS: tuple[str, ...] = get_args(Split)

_SPLIT_OF_REMAINDER = {0: "calibration", 10: "live"}
_HASH_MODULUS = 20


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt of one task family and the completion that belongs to it."""

    family: str
    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Prompt and completion as one string, as a model is trained on it."""
        return self.prompt + self.completion


def split_of(content: str) -> str:
    """The split that a piece of content belongs to: 1 in 20 calibration, 1 in 20 live, the rest train."""
    digest = hashlib.blake2b(content.encode("utf-8"), digest_size=8).digest()
    return _SPLIT_OF_REMAINDER.get(int.from_bytes(digest, "big") % _HASH_MODULUS, "train")


def documents(family: str, split: Split, seed: int) -> Iterator[Document]:
    """Endless documents of one family and split; the same arguments give the same documents.

    Prose goes through the standard library again and again, each time in another order.
    """
    _check_name("family", family, FAMILIES)
    _check_name("split", split, SPLITS)
    rng = random.Random(f"{family}/{split}/{seed}")
    if family in _GENERATORS:
        return _generated(family, split, rng)
    return _prose(split, rng)


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(known)})")


def _generated(family: str, split: str, rng: random.Random) -> Iterator[Document]:
    make = _GENERATORS[family]
    while True:
        prompt, completion = make(rng)
        if split_of(prompt) == split:
            yield Document(family, prompt, completion)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- chat: templates with slots -----------------------------------------------------------------------------

_NAMES = _words(
    "Anna Ben Carla David Elena Felix Grace Hugo Irene Jonas Karim Laura Marco Nadia Oscar Paula Quentin "
    "Rosa Simon Tara Umar Vera Walter Xenia Yusuf Zoe"
)
_CITIES = _words(
    "Oslo Lisbon Vienna Dublin Athens Prague Madrid Berlin Zurich Warsaw Rome Cairo Lima Quito Tokyo "
    "Seoul Delhi Nairobi Boston Denver Austin Sydney"
)
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_FOODS = _words("Thai Italian Greek Indian Mexican Japanese French Turkish Korean Spanish")
_COUNTS = _words("two three four five six seven eight nine ten twelve")
_DEVICES = _words("printer router laptop phone camera tablet keyboard monitor speaker headset")
_COLOURS = _words("red blue green black white yellow brown grey orange purple")
_GOODS = _words("jacket sweater lamp chair backpack kettle watch blanket bicycle helmet teapot carpet")
_TOPICS = _words("history gardening astronomy cooking sailing chess music painting travel geology birds poetry")
_VEGETABLES = _words("tomato carrot onion potato mushroom lentil pumpkin spinach pepper cabbage leek bean")
_WEATHER = _words("rainy sunny windy snowy cloudy foggy stormy mild")
_SYMPTOMS = (
    "does not turn on",
    "loses the connection",
    "makes a strange noise",
    "is very slow",
    "shows an error message",
    "gets too hot",
)

# One entry: ways to ask, ways to answer. Asking and answering are drawn independently.
_CHATS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            (
                "Hello, my name is {name} and I would like to book a table for {count} at a {food} "
                "restaurant in {city} on {day} evening."
            ),
            (
                "Hi, this is {name}. Please reserve a table for {count} on {day} evening. We are in "
                "{city} and would love some {food} food."
            ),
        ),
        (
            (
                "Of course, {name}! I have booked a table for {count} at a {food} restaurant in {city} on"
                " {day} evening. You will receive a message shortly. Is there anything else I can do for "
                "you?"
            ),
            (
                "Thank you, {name}. Your table for {count} on {day} evening is reserved. The {food} "
                "restaurant is in the centre of {city}. Enjoy your meal!"
            ),
        ),
    ),
    (
        (
            (
                "Hi, I am {name}. The {colour} {good} that I ordered last {day} has not arrived in {city}"
                " yet. Could you please check where it is?"
            ),
            (
                "Good morning, {name} here. I ordered a {colour} {good} last {day} and I am still waiting"
                " for it in {city}. Can you help me?"
            ),
        ),
        (
            (
                "I am sorry about the delay, {name}. Your {colour} {good} was sent from {city} and should"
                " arrive before {day2}. Please let me know if it does not, and we will send a new {good} "
                "for free."
            ),
            (
                "Thank you for your patience, {name}. The {colour} {good} is on its way to {city}. It "
                "will be with you on {day2}. I am sorry that you had to wait."
            ),
        ),
    ),
    (
        (
            (
                "My {device} {symptom} since {day}. I have tried to restart the {device} but nothing "
                "changed. What should I do now? My name is {name}."
            ),
            ("Hello, {name} speaking. Since {day} my {device} {symptom}. Do you know how I can repair the {device}?"),
        ),
        (
            (
                "I am sorry to hear that your {device} {symptom}, {name}. First, unplug the {device} and "
                "wait for {count} minutes. Then plug it in again. If the {device} still {symptom}, please"
                " bring it to our shop."
            ),
            (
                "Let us look at this together, {name}. If a {device} {symptom}, an update often helps. "
                "Open the settings of the {device}, choose update, and wait for {count} minutes."
            ),
        ),
    ),
    (
        (
            (
                "I will travel from {city} to {city2} on {day} and stay for {count} days. The weather "
                "there is {weather}. What should I pack?"
            ),
            (
                "On {day} I leave {city} and fly to {city2} for {count} days. They say that it is "
                "{weather} there. Any advice on what to take with me?"
            ),
        ),
        (
            (
                "For {count} days in {city2} you do not need much. As it is {weather} there, take a "
                "{colour} {good} and good shoes. Have a safe trip from {city} to {city2}!"
            ),
            (
                "That sounds like a nice trip! It is {weather} in {city2}, so pack warm clothes for "
                "{count} days, and do not forget your passport when you leave {city} on {day}."
            ),
        ),
    ),
    (
        (
            (
                "My friend {name} likes {topic} and has a birthday on {day}. Can you recommend a present?"
                " We live in {city} and I do not want to spend too much."
            ),
            (
                "I need a present for {name}, who loves {topic}. The party is on {day} in {city}. What "
                "would you suggest?"
            ),
        ),
        (
            (
                "A book about {topic} would be a lovely present for {name}. You can find one in any book "
                "shop in {city}, and it will be there in time for {day}."
            ),
            (
                "How about a course in {topic}? There is one in {city} that starts the week after {day}. "
                "I am sure that {name} would be happy with it."
            ),
        ),
    ),
    (
        (
            (
                "I have some {vegetable} and some {vegetable2} at home and {count} guests on {day}. Could"
                " you suggest a simple recipe for a {food} dinner?"
            ),
            (
                "On {day} {count} friends come for dinner. There is only {vegetable} and {vegetable2} in "
                "my kitchen. Is there a {food} dish that I can cook?"
            ),
        ),
        (
            (
                "You can make a {food} soup for {count} people. Cut the {vegetable} and the {vegetable2},"
                " cook them for twenty minutes, then add salt and pepper. Serve the soup with fresh "
                "bread."
            ),
            (
                "Try a {food} stew with {vegetable} and {vegetable2}. Fry the {vegetable} first, add the "
                "{vegetable2} and some water, and let it cook slowly. It is enough for {count} people."
            ),
        ),
    ),
    (
        (
            (
                "Please write a short note to {name}: our meeting in {city} moves from {day} to {day2}, "
                "and {count} people will be there to talk about {topic}."
            ),
            (
                "Can you tell {name} that the {topic} meeting with {count} people in {city} is now on "
                "{day2} and not on {day}?"
            ),
        ),
        (
            (
                "Dear {name}, our meeting about {topic} in {city} has been moved from {day} to {day2}. "
                "There will be {count} of us. I hope that {day2} works for you. Kind regards."
            ),
            (
                "Hello {name}, please note that we will not meet on {day} but on {day2}. The place is "
                "still {city}, the topic is still {topic}, and {count} people will come. See you there!"
            ),
        ),
    ),
)


def _chat(rng: random.Random) -> tuple[str, str]:
    asks, answers = rng.choice(_CHATS)
    day, day2 = rng.sample(_DAYS, 2)
    city, city2 = rng.sample(_CITIES, 2)
    vegetable, vegetable2 = rng.sample(_VEGETABLES, 2)
    slots = {
        "name": rng.choice(_NAMES),
        "day": day,
        "day2": day2,
        "city": city,
        "city2": city2,
        "vegetable": vegetable,
        "vegetable2": vegetable2,
        "food": rng.choice(_FOODS),
        "count": rng.choice(_COUNTS),
        "device": rng.choice(_DEVICES),
        "symptom": rng.choice(_SYMPTOMS),
        "colour": rng.choice(_COLOURS),
        "good": rng.choice(_GOODS),
        "topic": rng.choice(_TOPICS),
        "weather": rng.choice(_WEATHER),
    }
    ask, answer = rng.choice(asks), rng.choice(answers)
    return f"User: {ask.format(**slots)}\nAssistant:", f" {answer.format(**slots)}"


# --- qa: look-up over a context of facts --------------------------------------------------------------------

_JOBS = _words("baker teacher doctor painter pilot farmer lawyer singer writer nurse dancer plumber")
_ANIMALS = _words("dog cat horse parrot rabbit turtle goat donkey snake duck")
_RELATIONS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    # (fact, question, answer, values)
    ("{who} lives in {x}.", "Where does {who} live?", "{who} lives in {x}.", _CITIES),
    ("{who} works as a {x}.", "What is the job of {who}?", "{who} works as a {x}.", _JOBS),
    ("{who} has a {x}.", "Which animal does {who} have?", "{who} has a {x}.", _ANIMALS),
    ("{who} likes {x}.", "What does {who} like?", "{who} likes {x}.", _TOPICS),
    ("{who} drives a {x} car.", "Which colour is the car of {who}?", "The car of {who} is {x}.", _COLOURS),
    ("{who} eats {x} food.", "Which food does {who} eat?", "{who} eats {x} food.", _FOODS),
)


def _qa(rng: random.Random) -> tuple[str, str]:
    who = rng.sample(_NAMES, rng.randint(2, 3))
    pairs = [(person, relation) for person in who for relation in _RELATIONS]
    facts = [(person, relation, rng.choice(relation[3])) for person, relation in rng.sample(pairs, rng.randint(4, 5))]
    asked = rng.sample(facts, rng.randint(3, 4))
    told = " ".join(fact.format(who=person, x=x) for person, (fact, *_), x in facts)
    questions = " ".join(question.format(who=person) for person, (_, question, *_), _ in asked)
    answers = "".join(f"\n- {answer.format(who=person, x=x)}" for person, (_, _, answer, _), x in asked)
    return f"Facts: {told}\nQuestions: {questions}\nAnswers:", answers


# --- arithmetic ---------------------------------------------------------------------------------------------


def _sum(rng: random.Random) -> tuple[str, int]:
    """Sums small enough for a tiny model to know them."""
    kind = rng.random()
    if kind < 0.5:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return f"{a} + {b}", a + b
    if kind < 0.8:
        a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
        return f"{a} - {b}", a - b
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"{a} * {b}", a * b


def _arithmetic(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.3:
        return _shopping(rng)
    sums = [_sum(rng) for _ in range(rng.randint(4, 6))]
    tasks = "".join(f"\n{left} = ?" for left, _ in sums)
    return f"Compute:{tasks}\nResults:", "".join(f"\n{left} = {value}" for left, value in sums)


def _shopping(rng: random.Random) -> tuple[str, str]:
    who = rng.choice(_NAMES)
    start, change, change2 = rng.randint(9, 20), rng.randint(1, 9), rng.randint(1, 9)
    bead, loses = rng.choice(("beads", "coins", "nuts", "stamps", "shells")), rng.random() < 0.5
    middle = start + change
    end = middle - change2 if loses else middle + change2
    verb, sign = ("loses", "-") if loses else ("buys", "+")
    prompt = (
        f"Problem: {who} has {start} {bead}. {who} finds {change} {bead}. Then {who} {verb} {change2} {bead}. "
        f"How many {bead} does {who} have?\nSolution:"
    )
    return prompt, (f"\n{start} + {change} = {middle}\n{middle} {sign} {change2} = {end}\n{who} has {end} {bead}.")


# --- lists --------------------------------------------------------------------------------------------------

_LIST_TASKS: tuple[tuple[str, Callable[[list[int]], list[int]]], ...] = (
    ("Sort", sorted),
    ("Reverse", lambda items: items[::-1]),
    ("Sort down", lambda items: sorted(items, reverse=True)),
    ("Rotate", lambda items: items[1:] + items[:1]),
    ("Swap ends", lambda items: [items[-1], *items[1:-1], items[0]]),
)


def _lists(rng: random.Random) -> tuple[str, str]:
    name, task = rng.choice(_LIST_TASKS)
    rows = [rng.sample(range(100), rng.randint(6, 8)) for _ in range(2)]
    shown = "".join("\n" + " ".join(map(str, row)) for row in rows)
    return f"{name}:{shown}\nResult:", "".join("\n" + " ".join(map(str, task(row))) for row in rows)


# --- code ---------------------------------------------------------------------------------------------------

_CLASSES = _words(
    "Account Album Batch Bridge Camera Channel Cluster Contract Device Engine Flight Garden Invoice Journey Kernel "
    "Ledger Machine Meeting Module Network Order Package Payment Player Project Queue Record Report Request Sensor "
    "Session Shelf Signal Station Student Ticket Vehicle Window"
)
_FIELDS = _words(
    "amount anchor block bucket cell count delta entry field first flag frame handle index inner item kind label level "
    "limit mark member name node number offset outer owner part place point price record root sample score shape size "
    "slot source start state step table target total unit value weight width"
)
_CODE_TASKS: tuple[tuple[str, Callable[[str, list[str]], str]], ...] = (
    ("Write the constructor.", lambda name, fields: _constructor(fields)),
    ("Write the getters.", lambda name, fields: "".join(_getter(f) for f in fields[:3])),
    ("Write the setters.", lambda name, fields: "".join(_setter(f) for f in fields[:2])),
    ("Write to_dict.", lambda name, fields: _to_dict(fields)),
    ("Write the test.", lambda name, fields: _test(name, fields)),
)


def _constructor(fields: list[str]) -> str:
    lines = "".join(f"\n        self.{f} = {f}" for f in fields)
    return f"\n    def __init__(self, {', '.join(fields)}):{lines}"


def _getter(field: str) -> str:
    return f"\n    def get_{field}(self):\n        return self.{field}"


def _setter(field: str) -> str:
    return f"\n    def set_{field}(self, {field}):\n        self.{field} = {field}"


def _to_dict(fields: list[str]) -> str:
    lines = "".join(f'\n            "{f}": self.{f},' for f in fields)
    return f"\n    def to_dict(self):\n        return {{{lines}\n        }}"


def _test(name: str, fields: list[str]) -> str:
    made = ", ".join(str(k + 1) for k in range(len(fields)))
    lines = "".join(f"\n    assert it.{f} == {k + 1}" for k, f in enumerate(fields))
    return f"\ndef test_{name.lower()}():\n    it = {name}({made}){lines}"


def _code(rng: random.Random) -> tuple[str, str]:
    """What editors complete all day: methods that follow from a class and its fields."""
    name, fields = rng.choice(_CLASSES), rng.sample(_FIELDS, rng.randint(3, 5))
    task, write = rng.choice(_CODE_TASKS)
    prompt = f"class {name}:\n    # Fields: {', '.join(fields)}.\n    # {task}"
    return prompt, write(name, fields)


_GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "chat": _chat,
    "qa": _qa,
    "arithmetic": _arithmetic,
    "lists": _lists,
    "code": _code,
}


# --- prose: docstrings of the standard library --------------------------------------------------------------

_PACKAGES = _words(
    "asyncio collections concurrent ctypes curses dbm email html http importlib json logging "
    "multiprocessing sqlite3 tkinter unittest urllib wsgiref xml xmlrpc zoneinfo"
)
_PROMPT_CHARS, _COMPLETION_CHARS = 150, 150  # lower and upper bound for prose


@dataclass(frozen=True, slots=True)
class _Piece:
    """Text out of one docstring, with what follows it there."""

    split: str
    text: str
    following: str


def _prose(split: str, rng: random.Random) -> Iterator[Document]:
    pieces = [piece for piece in _library_pieces() if piece.split == split and piece.following]
    if not pieces:
        raise ValueError("no standard library sources found for family 'prose'")
    while True:
        for piece in rng.sample(pieces, len(pieces)):
            yield Document("prose", piece.text, f" {piece.following}")


@lru_cache(maxsize=1)
def _library_pieces() -> tuple[_Piece, ...]:
    """All pieces. The first docstring that holds a piece owns it, so no piece is in two splits.

    A continuation that is itself a piece of another split is not shown.
    """
    owned: dict[str, _Piece] = {}
    for docstring in _docstrings():
        for piece in _prose_pieces(docstring):
            owned.setdefault(piece.text, piece)

    def shown(piece: _Piece) -> _Piece:
        owner = owned.get(piece.following)
        return piece if owner is None or owner.split == piece.split else replace(piece, following="")

    return tuple(map(shown, owned.values()))


def _docstrings() -> tuple[str, ...]:
    """Whole docstrings, each once, in a stable order."""
    found: dict[str, None] = {}
    for path in _library_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        if not source.isascii():
            continue
        for node in _outer_nodes(ast.parse(source)):
            docstring = ast.get_docstring(node)
            if docstring:
                found[docstring] = None
    return tuple(found)


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = [path for package in _PACKAGES for path in (root / package).rglob("*.py")]
    ours = [path for path in [*root.glob("*.py"), *inside] if "test" not in path.parts]
    return sorted(ours, key=lambda path: path.relative_to(root).as_posix())


def _outer_nodes(module: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """The module, its classes, and the functions not inside another function."""
    yield module
    stack: list[ast.AST] = list(reversed(module.body))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield node
            stack.extend(reversed(node.body))


def _groups(items: list[str], glue: str, limit: int) -> Iterator[str]:
    """Neighbouring items joined up to a length of `limit` (a longer item stays alone)."""
    group = ""
    for item in items:
        if group and len(group) + len(item) + len(glue) > limit:
            yield group
            group = ""
        group = f"{group}{glue}{item}" if group else item
    if group:
        yield group


def _prose_pieces(docstring: str) -> Iterator[_Piece]:
    kept = [block for block in re.split(r"\n\s*\n", docstring) if ">>>" not in block and "::" not in block]
    words = " ".join(kept).split()
    parts = list(_groups(words, " ", _PROMPT_CHARS))
    split = split_of(docstring)
    for text, following in zip(parts[::2], parts[1::2], strict=False):
        if len(following) >= 70 and len(text) >= 100:
            yield _Piece(split, text, following[:_COMPLETION_CHARS])
