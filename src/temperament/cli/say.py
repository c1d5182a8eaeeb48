"""Where a verb speaks: results on stdout, progress and complaints on stderr. rich is loaded when something needs it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDEST = 120


@dataclass
class Say:
    json: bool = False
    main: bool = True  # the one of several processes that speaks
    quiet: bool = False
    stdout: Any = field(default_factory=lambda: sys.stdout)  # as it was before a verb's libraries could write to it

    @property
    def terminal(self) -> bool:
        return bool(getattr(self.stdout, "isatty", bool)())

    def print(self, text: str = "") -> None:
        if self.main:
            print(text, file=self.stdout, flush=True)

    def error(self, sentence: str) -> None:
        tty = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(f"\x1b[31m{sentence}\x1b[0m" if tty else sentence, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line on stderr that is no error."""
        if self.main and not self.quiet:
            self.err.print(text, style="dim", markup=False, highlight=False)

    @cached_property
    def out(self) -> Console:
        return console(self.stdout)

    @cached_property
    def err(self) -> Console:
        return console(sys.stderr)

    def table(self, columns: list[str], rows: list[list[Any]], right: tuple[int, ...] = (), title: str = "") -> None:
        """A quiet table on stdout: no boxes, aligned, heads dim."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title=title or None, title_justify="left"
        )
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i in right else "left", overflow="fold", no_wrap=i == 0)
        for row in rows:
            table.add_row(*(cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in row))
        self.out.print(table)


def console(stream: Any) -> Console:
    """Colour and width as the stream has them; in a pipe lines are not folded at 80."""
    from rich.console import Console

    tty = bool(getattr(stream, "isatty", bool)())
    made = Console(
        file=stream if tty else _Trimmed(stream),
        highlight=False,
        emoji=False,
        markup=True,
        soft_wrap=False,
        width=None if tty else 160,
    )
    if tty and made.width > WIDEST:
        made = Console(file=stream, highlight=False, emoji=False, width=WIDEST)
    return made


class _Trimmed:
    """A stream without the blanks that fill lines up: a file or a pipe has no width."""

    def __init__(self, stream: Any):
        self.stream, self.held = stream, ""

    def write(self, text: str) -> int:
        *lines, self.held = (self.held + text).split("\n")
        self.stream.write("".join(line.rstrip(" ") + "\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self.stream.write(self.held)
        self.held = ""
        self.stream.flush()

    def isatty(self) -> bool:
        return False
