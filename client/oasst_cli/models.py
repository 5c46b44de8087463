"""`oasst models`: what is served."""

import dataclasses
import json
from typing import Annotated

import typer
from oasst_client import Client, Model
from rich.console import Console
from rich.table import Table

from oasst_cli.options import DEFAULT_ADDRESS, Address

__all__ = ["models"]


def models(
    address: Address = DEFAULT_ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Prints one line of JSON for each model.")] = False,
) -> None:
    """List the served models, their limits and presets."""
    with Client(address) as client:
        served = client.models()
    if as_json:
        for model in served:
            print(json.dumps(dataclasses.asdict(model)))
    else:
        Console(highlight=False).print(_table(served))


def _table(served: tuple[Model, ...]) -> Table:
    table = Table("model", "positions", "max prompt", "max new", "vocabulary", "presets", box=None)
    for model in served:
        limits = (model.max_positions, model.max_prompt_tokens, model.max_new_tokens, model.tokenizer_size)
        table.add_row(model.name, *map(str, limits), ", ".join(preset.name for preset in model.presets))
    return table
