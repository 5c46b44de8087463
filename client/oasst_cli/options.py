"""The command-line options that several commands share, and the connection they describe."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from oasst_client import ChatOptions, Client, Profile, connect, load_profile

__all__ = [
    "DEFAULT_ADDRESS",
    "Address",
    "AsJson",
    "MaxNewTokens",
    "ModelName",
    "Preset",
    "ProfileName",
    "Seed",
    "Temperature",
    "TopK",
    "TopP",
    "check_writable",
    "chosen_profile",
    "connected",
    "finite",
    "given_options",
    "json_line",
    "text_or_stdin",
    "utf8",
]

DEFAULT_ADDRESS = Profile().address


def utf8(value: str | None) -> str | None:
    """The option's value.

    Raises:
        BadParameter: it is no UTF-8, which Python keeps as lone surrogates.
    """
    try:
        (value or "").encode()
    except UnicodeError as error:
        raise typer.BadParameter(f"{value!r} is not UTF-8") from error
    return value


def finite(value: float) -> float:
    """The option's value.

    Raises:
        BadParameter: it is infinite, or no number.
    """
    if not math.isfinite(value):
        raise typer.BadParameter("must be finite")
    return value


Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The gateway, or several IP addresses separated by commas. "
        f"[env: OASST_ADDRESS; default: {DEFAULT_ADDRESS}]",
    ),
]
ProfileName = Annotated[
    str | None,
    typer.Option("--profile", metavar="NAME", help="A profile from the profile file: address, key and TLS."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Prints JSON.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", callback=utf8, help="A served model's name; needed only if there are several."),
]
Preset = Annotated[
    str | None,
    typer.Option(callback=utf8, help="A named sampling preset, for example k50; `oasst models` lists them."),
]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="Draws from the k most likely tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draws from the most likely tokens that make up this probability.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="The longest answer, in tokens.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**64 - 1, help="The same question with the same seed gets the same answer.")
]


def chosen_profile(address: str | None, profile: str | None) -> Profile:
    """How to reach the service that the options name.

    An address alone is not combined with the file's default profile: its key is for another service.

    Raises:
        ProfileError: there is no such profile, or it cannot be used.
    """
    if address is None:
        return load_profile(profile)
    is_file_meant = profile is not None or bool(os.environ.get("OASST_PROFILE"))
    loaded = load_profile(profile) if is_file_meant else load_profile(path=Path(os.devnull))
    return dataclasses.replace(loaded, address=address)


def connected(address: str | None, profile: str | None) -> Client:
    """A client of the service that the options name."""
    return connect(chosen_profile(address, profile))


def text_or_stdin(text: str | None) -> str:
    """The argument, or without one what standard input holds.

    Raises:
        BadParameter: it is no UTF-8.
    """
    try:
        if text is None:
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]  # a text file
            return sys.stdin.read()
        text.encode()  # Python keeps what is no UTF-8 of an argument as lone surrogates.
    except UnicodeError as error:
        raise typer.BadParameter(f"{'standard input' if text is None else 'the text'} is not UTF-8") from error
    return text


def check_writable(out: Path) -> None:
    """The file can be written: asked before the work that it is to hold.

    Raises:
        BadParameter: it cannot.
    """
    try:
        with out.open("a"):
            pass
    except OSError as error:
        raise typer.BadParameter(f"{out} cannot be written: {error.strerror}", param_hint="--out") from error


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


def json_line(value: Any) -> str:
    """One line of JSON of a frozen value, or of plain ones."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, ensure_ascii=False)
