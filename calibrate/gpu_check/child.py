"""One group in a process of its own: a crash, an error that spoils the device, or a hang stays in here."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from heliosim.errors import HelioSimError

from .book import Book
from .plan import Group, Options, groups


def run_group(group: Group, names: list[str], options: Options, work: Path) -> None:
    """Run the named measures in order; one that fails is noted and the next one begins."""
    folder = work / group.name
    folder.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {"work": work, "group": group.name}
    for measure in group.measures:
        if measure.name not in names:
            continue
        (folder / f"{measure.name}.rows.jsonl").unlink(missing_ok=True)
        book = Book(options, measure, folder, shared)
        book.save()
        print(f"{group.name}: {measure.title}", flush=True)
        try:
            module, _, function = measure.run.partition(":")
            getattr(import_module(f"{__package__}.{module}"), function)(book)
            book.state = "done"
        except HelioSimError as error:
            book.state, book.error = "failed", str(error)
        except Exception as error:
            traceback.print_exc()
            book.state = "failed"
            book.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        book.save()


def main() -> None:
    work, name, *names = Path(sys.argv[1]), *sys.argv[2:]
    options = Options.from_json((work / "options.json").read_text(encoding="utf-8"))
    group = next(g for g in groups(options) if g.name == name)
    run_group(group, names, options, work)


if __name__ == "__main__":
    main()
