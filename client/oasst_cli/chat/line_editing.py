"""What the arrow keys and the tab key do while a question is typed."""

import os
import readline
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["history_path", "line_editing"]

_MAX_QUESTIONS = 1000


@contextmanager
def line_editing(commands: Sequence[str], *, history: Path | None) -> Iterator[None]:
    """Inside, `input` completes the commands, and remembers what was typed before in `history` if there is one."""
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, state: _completion(text, state, commands))
    readline.parse_and_bind("tab: complete")
    if history is None:
        yield
        return
    # A history that cannot be read or kept is no reason not to chat.
    with suppress(OSError):
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(_MAX_QUESTIONS)
        with suppress(OSError):
            readline.write_history_file(history)


def history_path() -> Path:
    """Where typed questions are remembered, for their owner alone."""
    folder = os.environ.get("XDG_STATE_HOME")
    return (Path(folder) if folder else Path.home() / ".local" / "state") / "oasst" / "history"


def _completion(text: str, state: int, commands: Sequence[str]) -> str | None:
    """The `state`th command that begins with `text`; a question is not completed."""
    fitting = [command for command in commands if text.startswith("/") and command.startswith(text)]
    return fitting[state] if state < len(fitting) else None
