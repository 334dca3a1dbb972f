"""Tables and progress for the command line and the benchmarks: rich where it is installed, plain text without it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

try:
    import rich.console
    import rich.progress
    import rich.table
    import rich.text

    HAVE_RICH = True
except ImportError:  # a benchmark run from a source tree on a machine without the package's dependencies
    HAVE_RICH = False

#: Width of tables that go to a file or a pipe, where there is no terminal to ask.
PIPED_WIDTH = 160


def console(stderr: bool = False) -> Any:
    """A rich console as wide as the terminal, or ``PIPED_WIDTH`` in a pipe, that leaves numbers uncoloured."""
    stream = sys.stderr if stderr else sys.stdout
    return rich.console.Console(file=stream, width=None if stream.isatty() else PIPED_WIDTH, highlight=False)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table as text: the first ``left`` columns aligned left, the others right."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([title, line(columns), line(["-" * w for w in widths]), *map(line, rows)])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print a table to stdout; every cell is shown as it is (no markup)."""
    if not HAVE_RICH:
        print(plain_table(title, columns, rows, left))
        return
    table = rich.table.Table()
    for i, column in enumerate(columns):
        table.add_column(rich.text.Text(column), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(rich.text.Text(cell) for cell in row))
    out = console()
    out.print(rich.text.Text(title, style="bold"))  # not the table's own title, which wraps at the table's width
    out.print(table)


@contextlib.contextmanager
def progress(description: str, total: int, show: bool = True) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields the function that moves it one step. ``show=False``: nothing is printed."""
    if not (HAVE_RICH and show and sys.stderr.isatty()):
        if show:
            print(f"{description} ...", file=sys.stderr, flush=True)
        yield lambda: None
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.completed}/{task.total}"),
        rich.progress.TimeElapsedColumn(),
        console=console(stderr=True),
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
