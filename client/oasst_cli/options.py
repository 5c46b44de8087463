"""The command-line options that several commands share."""

from typing import Annotated

import typer
from oasst_client import ChatOptions

__all__ = [
    "DEFAULT_ADDRESS",
    "Address",
    "MaxNewTokens",
    "ModelName",
    "Preset",
    "Seed",
    "Temperature",
    "TopK",
    "TopP",
    "given_options",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"

Address = Annotated[
    str, typer.Option(metavar="HOST:PORT", envvar="OASST_ADDRESS", help="The gateway, or several parted by commas.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="A served model's name; not needed where one is served.")
]
Preset = Annotated[
    str | None, typer.Option(help="A named sampling preset, for example k50; `oasst models` lists them.")
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token each time.")]
TopK = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Draws from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draws from the most likely tokens that make up this probability.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="The longest answer, in tokens.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="The same question with the same seed gets the same answer.")
]


def given_options(
    *,
    model: str | None,
    preset: str | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    max_new_tokens: int | None,
    seed: int | None,
) -> ChatOptions:
    """The options that were given on the command line; what was not is left to the server."""
    options: ChatOptions = {}
    if model is not None:
        options["model"] = model
    if preset is not None:
        options["preset"] = preset
    if temperature is not None:
        options["temperature"] = temperature
    if top_k is not None:
        options["top_k"] = top_k
    if top_p is not None:
        options["top_p"] = top_p
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if seed is not None:
        options["seed"] = seed
    return options
