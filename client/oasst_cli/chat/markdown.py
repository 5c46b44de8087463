"""Markdown on a terminal while it is still being written."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

__all__ = ["MarkdownStream", "split_settled"]

_FENCES = ("```", "~~~")
_FRAMES_PER_S = 12


def split_settled(text: str) -> tuple[str, str]:
    r"""`text` in two: blocks that nothing written later can change, and the rest.

    A block is settled by the blank line and the unindented line behind it, except inside of fenced code. Lists stay
    together, because their numbers and spacing depend on all of their items.

    >>> split_settled("# Owls\n\nThey see\nat night.\n\nThey")
    ('# Owls\n\nThey see\nat night.\n\n', 'They')
    >>> split_settled("```\none\n\ntwo")
    ('', '```\none\n\ntwo')
    """
    settled = position = 0
    fence = ""
    is_after_blank = False
    for line in text.splitlines(keepends=True):
        mark = line.lstrip()[:3]
        is_blank = not line.strip()
        if not fence and is_after_blank and not is_blank and line[0] not in " \t" and not _is_list_item(line):
            settled = position
        if mark in _FENCES and fence in ("", mark):
            fence = "" if fence else mark
        is_after_blank = not fence and is_blank
        position += len(line)
    return text[:settled], text[settled:]


def _is_list_item(line: str) -> bool:
    head = line.split(maxsplit=1)[0]
    return head in ("-", "*", "+") or head.rstrip(".)").isdecimal()


class MarkdownStream:
    """Shows Markdown as its text comes. What is settled scrolls away for good; only the rest is drawn anew.

    On leaving, however that happens, everything that came is on the screen.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""
        self._live = Live(console=console, refresh_per_second=_FRAMES_PER_S, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Transient, then printed: what is taller than the screen is whole only when it is printed.
        self._live.stop()
        self._print(self._rest)

    def write(self, text: str) -> None:
        settled, self._rest = split_settled(self._rest + text)
        if settled:
            self._print(settled)
        self._live.update(_markdown(self._rest))

    def _print(self, text: str) -> None:
        if text.strip():
            self._console.print(_markdown(text))
            self._console.print()


def _markdown(text: str) -> Markdown:
    return Markdown(text, code_theme="ansi_dark", hyperlinks=False)
