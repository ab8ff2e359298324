"""Following: what a stage says while it runs, wherever that is, and how a person sees it.

A stage prints lines that begin with `askew: `, some of which count (`3/8`); the last one is its result. Knows
nothing of stages and of Ray.
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from askew.config import RESULT

ANSI = re.compile(r"\x1b\[[0-9;]*m")
COUNT = re.compile(r"(?<![\d.])(\d[\d,]*)/(\d[\d,]*)(?![\d.])")
ERROR, WARNING = "error: ", "warning: "
WIDTH = 100


def said(line: str) -> str:
    """What a stage says in a line of its log; empty where the line is somebody else's, or its result."""
    _, found, text = ANSI.sub("", line).partition("askew: ")
    return text.strip() if found and not text.startswith("result: ") else ""


def counted(text: str) -> tuple[int, int] | None:
    """How much of how much is done, if what is said tells."""
    if not (found := COUNT.search(text)):
        return None
    done, total = (int(number.replace(",", "")) for number in found.groups())
    return (done, total) if 0 < total >= done else None


def result(lines: Sequence[str]) -> dict[str, Any] | None:
    """The result that a stage's lines end with, if any."""
    results = [line for line in lines if line.startswith(RESULT)]
    return dict(json.loads(results[-1].removeprefix(RESULT))) if results else None


def reason(lines: Sequence[str]) -> str:
    """The last of a failed stage's lines that tells why; empty when none does."""
    said_so = [text.removeprefix(ERROR) for text in map(said, lines) if text.startswith(ERROR)]
    others = [line for line in lines if "Error: " in line]
    return next((found[-1] for found in (said_so, others) if found), "")


class Lines(io.TextIOBase):
    """Stands in the place of stdout, and hands on what is written line by line."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line, self._begun = on_line, ""

    def write(self, text: str) -> int:
        """Take text; a line is handed on when it ends."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._on_line(line)
        return len(text)

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True


@contextmanager
def showing(console: Console, name: str, plain: bool = True) -> Iterator[Callable[[str], None]]:
    """Show meanwhile what a stage says: give what is yielded each line of its log.

    On a terminal one line moves, with a bar where the stage counts, and warnings stay to be read. Elsewhere each
    thing said is a line; none is without `plain`.
    """
    if not console.is_terminal:
        yield lambda line: _plain(console, name, said(line)) if plain else None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task(f"{name} …", total=None)
        yield lambda line: _moved(progress, task, name, said(line))


def _plain(console: Console, name: str, text: str) -> None:
    if text and not text.startswith(ERROR):
        console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _moved(progress: Progress, task: TaskID, name: str, text: str) -> None:
    if text.startswith(WARNING):
        progress.console.print(f"{name}: {text}", markup=False, highlight=False)
    elif text:
        done, total = counted(text) or (0, None)
        progress.update(task, description=escape(f"{name} … {text[:WIDTH]}"), completed=done, total=total)
