"""`oasst complete`: one answer to one question."""

from typing import Annotated

import typer
from oasst_client import CompletionStream, RequestCancelledError

from oasst_cli.exits import Exit
from oasst_cli.interrupts import closed_by_ctrl_c
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
    text_or_stdin,
)

__all__ = ["complete"]


def complete(
    text: Annotated[str | None, typer.Argument(help="The question; without it, standard input is read.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The text is a whole prompt in the OASST format.")] = False,
    preset: Preset = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
    model: ModelName = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question and exit."""
    options = given_options(
        model=model,
        preset=preset,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    question = text_or_stdin(text)
    messages, prompt = (None, question) if raw else (question, None)
    with (
        connected(address, profile) as client,
        client.stream(messages, prompt=prompt, **options) as stream,
        closed_by_ctrl_c(stream) as is_stopped,
    ):
        try:
            _show(stream, as_json=as_json)
        except RequestCancelledError as error:
            if is_stopped.is_set():
                raise typer.Exit(Exit.INTERRUPTED) from error
            raise


def _show(stream: CompletionStream, *, as_json: bool) -> None:
    if as_json:
        print(json_line(stream.completion()))
        return
    for text in stream:
        print(text, end="", flush=True)
    print()
