"""`oasst models`: what is served."""

from oasst_client import Model
from rich.console import Console
from rich.table import Table

from oasst_cli.options import Address, AsJson, ProfileName, connected, json_line

__all__ = ["models"]


def models(address: Address = None, profile: ProfileName = None, as_json: AsJson = False) -> None:
    """List the served models.

    With their limits and presets. --json prints one line for each model.
    """
    with connected(address, profile) as client:
        served = client.models()
    if as_json:
        for model in served:
            print(json_line(model))
    else:
        Console(highlight=False).print(_table(served))


def _table(served: tuple[Model, ...]) -> Table:
    table = Table("model", "positions", "max prompt", "max new", "vocabulary", "presets", box=None)
    for model in served:
        limits = (model.max_positions, model.max_prompt_tokens, model.max_new_tokens, model.tokenizer_size)
        table.add_row(model.name, *map(str, limits), ", ".join(preset.name for preset in model.presets))
    return table
