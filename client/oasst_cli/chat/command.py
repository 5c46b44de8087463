"""`oasst chat`: a conversation in the terminal, or one answer for each line of a pipe."""

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer
from oasst_client import ChatOptions, Client, Conversation, OasstError, Truncation
from rich.console import Console

from oasst_cli.chat.session import COMMANDS, ChatSession, load_conversation
from oasst_cli.options import (
    Address,
    AsJson,
    MaxNewTokens,
    ModelName,
    Preset,
    ProfileName,
    Seed,
    Temperature,
    TopK,
    TopP,
    connected,
    given_options,
    json_line,
    utf8,
)

__all__ = ["answer_lines", "chat"]

_PROMPT = "> "


def chat(
    system: Annotated[str, typer.Option(callback=utf8, help="Instructions before the first question.")] = "",
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continues a conversation that /save wrote.")
    ] = None,
    preset: Preset = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    plain: Annotated[bool, typer.Option("--plain", help="Shows answers as they are, not as Markdown.")] = False,
    history: Annotated[
        bool, typer.Option("--history/--no-history", help="Remembers questions for the arrow keys.")
    ] = True,
    model: ModelName = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Chat with the service. Earlier turns are remembered.

    On a terminal, Ctrl-C stops the current answer, Ctrl-D exits, and /help lists the commands. With piped input, each
    line is a question, and only the answers go to standard output.
    """
    options = given_options(
        model=model,
        preset=preset,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    options["truncation"] = Truncation.DROP_OLDEST_TURNS
    if as_json and sys.stdin.isatty():
        raise typer.BadParameter("--json answers piped questions; this is a terminal")
    if load and system:
        raise typer.BadParameter("--load brings a system text of its own; leave out --system")
    with connected(address, profile) as client:
        conversation = _load(client, load, options) if load else Conversation(client, system=system, **options)
        if sys.stdin.isatty():
            console = Console(highlight=False, soft_wrap=plain)
            session = ChatSession(client, conversation, console, is_plain=plain, options=options)
            _converse(session, keeps_history=history)
        else:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]  # a text file
            if not answer_lines(conversation, sys.stdin, sys.stdout, as_json=as_json):
                raise typer.Exit(1)


def answer_lines(
    conversation: Conversation, questions: Iterable[str], answers: TextIO, *, as_json: bool = False
) -> bool:
    """Every non-empty line is answered; whether all of them were. Errors go to standard error."""
    all_answered = True
    for question in map(str.strip, questions):
        if not question:
            continue
        try:
            completion = conversation.ask(question)
        except OasstError as error:
            all_answered = False
            typer.echo(f"error: {error}", err=True)
        else:
            print(json_line(completion) if as_json else completion.text, file=answers, flush=True)
    return all_answered


def _load(client: Client, file: Path, options: ChatOptions) -> Conversation:
    """The saved conversation to begin with.

    Raises:
        BadParameter: it cannot be read, or is none.
    """
    try:
        return load_conversation(client, file, options)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--load") from error


def _converse(session: ChatSession, *, keeps_history: bool) -> None:
    """Asks and answers until the person leaves."""
    # Here, because importing it is what changes how `input` reads a line; and there is none on Windows.
    from oasst_cli.chat.line_editing import history_path, line_editing

    # As an exception, so that `input` gives the terminal back as it was.
    signal.signal(signal.SIGTERM, _leave)
    print("Ask anything. /help lists the commands, Ctrl-D leaves.")
    with line_editing(list(COMMANDS), history=history_path() if keeps_history else None):
        while True:
            try:
                if line := input(_PROMPT).strip():
                    session.handle(line)
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
