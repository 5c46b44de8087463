"""`oasst complete`: one answer to one question."""

import dataclasses
import json
import sys
from typing import Annotated

import typer
from oasst_client import Client, CompletionStream

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

__all__ = ["complete"]


def complete(
    text: Annotated[str | None, typer.Argument(help="The question; without it, standard input is read.")] = None,
    address: Address = DEFAULT_ADDRESS,
    model: ModelName = None,
    raw: Annotated[bool, typer.Option("--raw", help="The text is a whole prompt in the OASST format.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Prints the whole result as one line of JSON.")] = False,
    preset: Preset = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
    seed: Seed = None,
) -> None:
    """Answer one question and leave."""
    options = given_options(
        model=model,
        preset=preset,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    question = sys.stdin.read() if text is None else text
    messages, prompt = (None, question) if raw else (question, None)
    with Client(address) as client, client.stream(messages, prompt=prompt, **options) as stream:
        if as_json:
            print(json.dumps(dataclasses.asdict(stream.completion()), ensure_ascii=False))
        else:
            _show(stream)


def _show(stream: CompletionStream) -> None:
    for text in stream:
        print(text, end="", flush=True)
    print()
