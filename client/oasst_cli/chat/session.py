"""What happens to a line that is typed in a chat: a question is answered, a /command is done."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasst_client import ChatOptions, Client, CompletionStream, Conversation, OasstError, Role
from rich.console import Console
from rich.table import Table

from oasst_cli.chat.markdown import MarkdownStream
from oasst_cli.interrupts import closed_by_ctrl_c

__all__ = ["COMMANDS", "ChatSession", "load_conversation"]

# What a preset decides, unless it is told beside it.
_PRESET_OPTIONS = frozenset(
    [
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    ]
)


def load_conversation(client: Client, file: Path, options: ChatOptions) -> Conversation:
    """The saved conversation, with these options on top of its own. Raises what `Conversation.load` raises."""
    saved = Conversation.load(client, file)
    together: ChatOptions = {**saved.options, **options}
    return Conversation(client, messages=saved.messages, **together)


class ChatSession:
    """One person's chat. Owns the conversation; /new, /back, /preset and /load put another one in its place."""

    def __init__(
        self,
        client: Client,
        conversation: Conversation,
        console: Console,
        *,
        is_plain: bool,
        options: ChatOptions | None = None,
    ) -> None:
        self.conversation = conversation
        self._client = client
        # Of the command line: they hold for conversations that are loaded, too.
        self._options = options or ChatOptions()
        self._console = console
        self._is_plain = is_plain or console.is_dumb_terminal

    def handle(self, line: str) -> None:
        """The line's question is answered or its command done. What goes wrong is told, and the chat goes on."""
        try:
            if line.startswith("/"):
                self._run(line)
            else:
                self._show(self.conversation.ask_stream(line))
        except (OasstError, OSError, ValueError) as error:
            self._tell_error(str(error))

    def again(self, _: str) -> None:
        self._check_asked()
        if self.conversation.options.get("temperature") == 0:
            raise ValueError("the chat takes the most likely token each time, so the answer stays; try /preset first")
        # A seed of the command line would draw the same answer again.
        self._show(self.conversation.regenerate_stream(seed=secrets.randbits(63)))

    def edit(self, text: str) -> None:
        self._check_asked()
        self._show(self.conversation.edit_stream(text))

    def back(self, _: str) -> None:
        self._check_asked()
        self.conversation = self.conversation.fork(self._num_questions - 1)

    def new(self, _: str) -> None:
        self.conversation = self.conversation.fork(0)

    def preset(self, name: str) -> None:
        known = [preset.name for preset in self._client.model(self._model).presets]
        if not name:
            self._console.print(", ".join(known))
        elif name not in known:
            raise ValueError(f"there is no preset {name}; there is {', '.join(known)}")
        else:
            # Any: what is kept of typed options.
            kept: Any = {key: value for key, value in self.conversation.options.items() if key not in _PRESET_OPTIONS}
            kept["preset"] = name
            self.conversation = Conversation(self._client, messages=self.conversation.messages, **kept)

    def tokens(self, _: str) -> None:
        max_positions = self._client.model(self._model).max_positions
        self._console.print(f"{self.conversation.num_tokens()} of {max_positions} tokens")

    def text(self, _: str) -> None:
        self._console.print(self.conversation.to_text(), markup=False)

    def save(self, file: str) -> None:
        self.conversation.save(Path(file).expanduser())

    def load(self, file: str) -> None:
        self.conversation = load_conversation(self._client, Path(file).expanduser(), self._options)

    def help(self, _: str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
        for name, command in COMMANDS.items():
            table.add_row(f"{name} {command.argument}", command.help)
        self._console.print(table, markup=False)

    @property
    def _model(self) -> str:
        return self.conversation.options.get("model", "")

    @property
    def _num_questions(self) -> int:
        return sum(each.role in (Role.USER, Role.PROMPTER) for each in self.conversation.messages)

    def _check_asked(self) -> None:
        """There is a last question; raises ValueError if there is none."""
        if not self._num_questions:
            raise ValueError("nothing was asked yet")

    def _run(self, line: str) -> None:
        name, _, argument = (part.strip() for part in line.partition(" "))
        command = COMMANDS.get(name)
        if command is None:
            raise ValueError(f"there is no {name}; /help tells what there is")
        if (command.needs_argument and not argument) or (argument and not command.argument):
            raise ValueError(f"it is {name} {command.argument}".rstrip())
        command.run(self, argument)

    def _show(self, stream: CompletionStream) -> None:
        """Shows the answer as it is generated; Ctrl-C stops it and leaves the conversation as it was."""
        with stream, closed_by_ctrl_c(stream) as is_stopped:
            try:
                if self._is_plain:
                    self._show_plain(stream)
                else:
                    self._show_markdown(stream)
            except OasstError:
                if not is_stopped.is_set():
                    if self._is_plain and stream.text:
                        print()
                    raise
                self._console.print(" [stopped]", markup=False)

    def _show_plain(self, stream: CompletionStream) -> None:
        for text in stream:
            print(text, end="", flush=True)
        print()

    def _show_markdown(self, stream: CompletionStream) -> None:
        with MarkdownStream(self._console) as screen:
            for text in stream:
                screen.write(text)

    def _tell_error(self, message: str) -> None:
        self._console.print(f"error: {message}", style="red", markup=False)


@dataclass(frozen=True, slots=True)
class _Command:
    """A line that begins with a slash."""

    run: Callable[[ChatSession, str], None]
    help: str
    # What stands behind the name; in brackets where it may be left out, empty where nothing does.
    argument: str = ""

    @property
    def needs_argument(self) -> bool:
        return bool(self.argument) and not self.argument.startswith("[")


COMMANDS = {
    "/again": _Command(ChatSession.again, "answers the last question anew"),
    "/edit": _Command(ChatSession.edit, "asks this in the place of the last question", "TEXT"),
    "/back": _Command(ChatSession.back, "takes the last question and its answer back"),
    "/new": _Command(ChatSession.new, "forgets what was said, but not the system text"),
    "/preset": _Command(ChatSession.preset, "samples by a preset from now on; without a name, lists them", "[NAME]"),
    "/tokens": _Command(ChatSession.tokens, "tells how much of the model's window is used"),
    "/text": _Command(ChatSession.text, "shows the conversation as OASST text"),
    "/save": _Command(ChatSession.save, "writes the conversation to a file", "FILE"),
    "/load": _Command(ChatSession.load, "goes on with a conversation from a file", "FILE"),
    "/help": _Command(ChatSession.help, "shows this list; Ctrl-C stops an answer, Ctrl-D leaves"),
}
