"""What `oasst up` tells people, on standard error."""

from contextlib import suppress
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape

from oasst_cli.up.child import Announcement

__all__ = ["Notices"]


class Notices:
    """Lines about what happens, and on a terminal a spinner that says what is waited for."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._spinner = self._console.status("starting")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._spinner.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.rest()

    @property
    def interval_s(self) -> float:
        """How often it is worth telling what is waited for."""
        return 0.2 if self._console.is_terminal else 5.0

    def say(self, line: str) -> None:
        # A terminal that is gone is no reason not to stop what was started.
        with suppress(OSError):
            self._console.print(escape(line))

    def wait_for(self, what: str) -> None:
        """Shows what is waited for, in the spinner if there is one, else as a line."""
        if self._console.is_terminal:
            self._spinner.update(escape(what[: self._console.width - 4]))
        else:
            self.say(what)

    def rest(self) -> None:
        """Nothing is waited for any more; the terminal is others' to write to."""
        with suppress(OSError):
            self._spinner.stop()

    def served(self, name: str, announcement: Announcement) -> None:
        at = f" at {announcement.listen}" if announcement.listen else ""
        self.say(f"{name} serves{at}")

    def died(self, name: str, reason: str, restart_in_s: float) -> None:
        self.say(f"{name} {reason}; starting it again in {restart_in_s:g} s")
