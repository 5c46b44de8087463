"""`oasst tokenize`: a text as the model reads it."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from oasst_cli.options import Address, AsJson, ModelName, ProfileName, connected, json_line, text_or_stdin

__all__ = ["tokenize"]

# Neighbours differ, so that one sees where a token ends.
_COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta")


def tokenize(
    text: Annotated[str | None, typer.Argument(help="The text; without it, standard input is read.")] = None,
    control_tokens: Annotated[
        bool, typer.Option("--control-tokens", help="Reads <|prompter|> and the like as control tokens, not as text.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Prints only how many tokens there are.")] = False,
    model: ModelName = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Show a text's tokens, their ids and number."""
    read = text_or_stdin(text)
    with connected(address, profile) as client:
        (ids,) = client.tokenize(read, model=model or "", parse_control_tokens=control_tokens)
        # Of a token that holds part of a character, U+FFFD.
        pieces = () if count else client.detokenize(*([each] for each in ids), model=model or "")
    if as_json:
        print(json_line({"num_tokens": len(ids)} if count else {"num_tokens": len(ids), "ids": ids, "pieces": pieces}))
    elif count:
        print(len(ids))
    else:
        _show(Console(highlight=False), ids, pieces)


def _show(console: Console, ids: tuple[int, ...], pieces: tuple[str, ...]) -> None:
    coloured = Text()
    for index, piece in enumerate(pieces):
        # A line break is shown, and broken behind, so that it is seen as part of its token.
        coloured.append(piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"), _COLOURS[index % 4])
    console.print(coloured)
    console.print(" ".join(map(str, ids)), style="dim")
    console.print(f"{len(ids)} tokens")
