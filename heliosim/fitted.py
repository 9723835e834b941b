"""Tables that fit the terminal without losing what their rows are: names are never cut, optional columns go first, and
what is still too wide stands in further tables below, with the names again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ENDLESS = 100_000


@dataclass(frozen=True)
class Column:
    """``is_name``: tells rows apart and is in every table. ``wrap``: cells longer than this go on in the next line, at
    words. ``optional``: 0 is always shown; of the others the greatest is left out first.
    """

    heading: str
    is_name: bool = False
    wrap: int = 0
    optional: int = 0


def fitted(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, *, ends: Collection[int] = ()
) -> list[Table]:
    """The rows as one table, or as several where ``width`` is too small for one. ``ends``: rows above a gap."""
    kept = list(range(len(columns)))
    while _width(columns, rows, kept) > width:
        optional = [k for k in kept if columns[k].optional]
        if not optional:
            break
        kept.remove(max(optional, key=lambda k: columns[k].optional))
    return [_table(columns, rows, part, ends) for part in _parts(columns, rows, kept, width)]


def print_fitted(
    out: Console, title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, ends: Collection[int] = ()
) -> None:
    """The title, and the rows as the console's width allows."""
    out.print(f"[bold]{title}[/]")
    print_tables(out, fitted(columns, rows, out.width, ends=ends))


def print_tables(out: Console, tables: Sequence[Table]) -> None:
    """One below the other, each with a blank line behind it."""
    for table in tables:
        out.print(table)
        out.print()


def broken(text: str, most: int = 12) -> str:
    """Text over several lines of about ``most`` characters, broken behind blanks, hyphens and underscores; nothing of
    it is lost. A piece without any is broken where the line is full.
    """
    import re

    lines = [""]
    for piece in re.findall(r"[^\s_-]*[\s_-]|[^\s_-]+", text):
        pieces = [piece[k : k + most] for k in range(0, len(piece), most)] if len(piece) > most + 1 else [piece]
        for one in pieces:
            if lines[-1] and len(lines[-1]) + len(one.rstrip()) > most:
                lines.append("")
            lines[-1] += one
    return "\n".join(line.rstrip() for line in lines)


def _parts(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: Sequence[int], width: int
) -> list[list[int]]:
    """Columns of each table: the names, then as many others as fit, one at least."""
    names = [k for k in kept if columns[k].is_name]
    parts: list[list[int]] = []
    for k in (k for k in kept if not columns[k].is_name):
        if parts and _width(columns, rows, [*parts[-1], k]) <= width:
            parts[-1].append(k)
        else:
            parts.append([*names, k])
    return parts or [names]


def _width(columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: Sequence[int]) -> int:
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=_ENDLESS)
    return Measurement.get(console, console.options, _table(columns, rows, kept, ())).maximum


def _table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: Sequence[int], ends: Collection[int]
) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for k in kept:
        column = columns[k]
        table.add_column(
            column.heading,
            justify="left" if column.is_name else "right",
            no_wrap=not column.is_name,
            overflow="fold",
            max_width=column.wrap or None,
        )
    for number, row in enumerate(rows):
        table.add_row(*(row[k] for k in kept), end_section=number in ends)
    return table
