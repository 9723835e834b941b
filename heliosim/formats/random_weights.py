"""Names of checkpoints that exist nowhere: random weights of an architecture, the same for the same name.

    random:ARCHITECTURE[@exits=6,12,24][,seed=0][,mlp=0]

``ARCHITECTURE``: a shipped architecture's name, a configuration file, or a folder that holds ``config.json``.
``exits``: exit layers (default: in steps of a quarter). OPT exits are ``fixed``, each with a norm of its own and, of
inner width ``mlp``, an MLP; Llama models exit ``anywhere``. Such weights take the time and memory of real ones of their
shape. What they say means nothing: figures of exits, quality or text must not be had from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from heliosim.errors import InputError, UnknownNameError

PREFIX = "random:"
SCHEME = 1
"""Of how weights are drawn; another number, other weights."""
_FORM = "Write random:ARCHITECTURE[@exits=6,12,24][,seed=0][,mlp=0]."
_OPTIONS = ("exits", "seed", "mlp")


@dataclass(frozen=True, slots=True)
class RandomName:
    """``config``: the configuration file; ``name``: of the model; ``exits`` None: in steps of a quarter; ``mlp``: inner
    width of the heads' MLP, 0 for none.
    """

    config: Path
    name: str
    exits: tuple[int, ...] | None = None
    seed: int = 0
    mlp: int = 0


def is_random(name: str | Path) -> bool:
    """Whether a checkpoint's name asks for random weights."""
    return str(name).startswith(PREFIX)


def split_names(text: str, *, random_only: bool = False) -> list[str]:
    """Names of checkpoints that commas separate; commas within a random one's options are its own. ``random_only``: all
    are architectures, whether they say ``random:`` or not.
    """
    found: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        is_option = piece.isdigit() or piece.partition("=")[0] in _OPTIONS
        if found and is_option and is_random(found[-1]):
            found[-1] += f",{piece}"
        elif piece:
            found.append(f"{PREFIX}{piece}" if random_only and not is_random(piece) else piece)
    return found


def canonical(text: str) -> str:
    """The same name with its configuration file's absolute path, so that it can be kept. Raises InputError."""
    head, options = _split(text)
    config, name = _config(head)
    said = name if name in _shipped() and _shipped()[name] == config else str(config)
    return f"{PREFIX}{said}" + (f"@{','.join(options)}" if options else "")


def parse_name(text: str) -> RandomName:
    """What a random checkpoint's name asks for. Raises InputError naming what is wrong."""
    head, options = _split(text)
    config, name = _config(head)
    values: dict[str, list[str]] = {}
    last = ""
    for option in options:
        key, is_given, value = option.partition("=")
        if not is_given and last == "exits":
            values["exits"].append(key)
            continue
        if key not in _OPTIONS:
            raise UnknownNameError(f"{text}: option", key, _OPTIONS)
        if key in values:
            raise InputError(text, option, f"{key} is given twice", _FORM)
        values[key], last = [value], key
    numbers = {key: [_number(text, key, v) for v in found] for key, found in values.items()}
    exits = numbers.get("exits")
    return RandomName(
        config, name, None if exits is None else tuple(exits), numbers.get("seed", [0])[0], numbers.get("mlp", [0])[0]
    )


def _split(text: str) -> tuple[str, list[str]]:
    """The architecture, and the options."""
    rest = text.removeprefix(PREFIX)
    at = min((i for i in (rest.find("@"), rest.find(",")) if i >= 0), default=len(rest))
    return rest[:at], [o.strip() for o in rest[at + 1 :].split(",") if o.strip()]


def _number(text: str, key: str, value: str) -> int:
    if not value.isdigit():
        raise InputError(f"{text}: {key}", value, "must be a whole number, 0 or more", _FORM)
    return int(value)


def _shipped() -> dict[str, Path]:
    root = Path(str(resources.files("heliosim.architectures")))
    return {path.stem: path for path in sorted(root.glob("*.json"))}


def _config(text: str) -> tuple[Path, str]:
    """The configuration file of an architecture, and what the model is called."""
    shipped = _shipped()
    if text.lower() in shipped:
        return shipped[text.lower()], text.lower()
    path = Path(text).expanduser()
    if not text:
        raise InputError("checkpoint", PREFIX, "names no architecture", _FORM)
    if path.is_dir():
        return (path / "config.json").resolve(), path.resolve().name
    if path.suffix == ".json" or len(path.parts) > 1:
        return path.resolve(), path.stem
    raise UnknownNameError("architecture", text, shipped)
