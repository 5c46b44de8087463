"""`oasst chat`: a conversation in the terminal, or one answer for each line of a pipe."""

import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer
from oasst_client import Client, Conversation, OasstError, Truncation

from oasst_cli.options import (
    DEFAULT_ADDRESS,
    Address,
    MaxNewTokens,
    ModelName,
    Preset,
    Seed,
    Temperature,
    TopK,
    TopP,
    given_options,
)

__all__ = ["answer_lines", "chat"]

_PROMPT = "> "


def chat(
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = None,
    system: Annotated[str, typer.Option(help="Instructions that stand before the first question.")] = "",
    preset: Preset = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
) -> None:
    """Chat with the service. What was said before is remembered.

    On a terminal, Ctrl-C stops the current answer and Ctrl-D leaves. With input piped in, each line is a question,
    and only the answers go to standard output.
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
    with Client(address) as client:
        conversation = Conversation(client, system=system, **options)
        if sys.stdin.isatty():
            _converse(conversation)
        else:
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]  # a text file
            if not answer_lines(conversation, sys.stdin, sys.stdout):
                raise typer.Exit(1)


def answer_lines(conversation: Conversation, questions: Iterable[str], answers: TextIO) -> bool:
    """Every non-empty line is answered; whether all of them were. Errors go to standard error."""
    all_answered = True
    for question in map(str.strip, questions):
        if not question:
            continue
        try:
            print(conversation.ask(question).text, file=answers, flush=True)
        except OasstError as error:
            all_answered = False
            typer.echo(f"error: {error}", err=True)
    return all_answered


def _converse(conversation: Conversation) -> None:
    """Asks and answers until the person leaves."""
    # Importing it is what gives `input` its history and line editing.
    import readline  # noqa: F401

    # As an exception, so that `input` gives the terminal back as it was.
    signal.signal(signal.SIGTERM, _leave)
    print("Ask anything; Ctrl-D leaves.")
    while True:
        try:
            question = input(_PROMPT).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question:
            _answer(conversation, question)


def _answer(conversation: Conversation, question: str) -> None:
    """Shows the answer as it is generated; Ctrl-C stops it and leaves the conversation as it was."""
    try:
        with conversation.ask_stream(question) as stream:
            for text in stream:
                print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except OasstError as error:
        print()
        typer.echo(f"error: {error}", err=True)


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
