"""`oasst cancel`: ends a request."""

from typing import Annotated

import typer

from oasst_cli.options import Address, AsJson, ProfileName, connected, json_line, utf8

__all__ = ["cancel"]


def cancel(
    request_id: Annotated[
        str, typer.Argument(callback=utf8, help="The request's id, from its sender or the gateway's log.")
    ],
    resume_token: Annotated[
        str,
        typer.Option(
            metavar="TOKEN", envvar="OASST_RESUME_TOKEN", callback=utf8, help="Proves that the request is yours."
        ),
    ] = "",
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """End a request, and print its state."""
    with connected(address, profile) as client:
        state = client.cancel(request_id, resume_token=resume_token)
    print(json_line({"request_id": request_id, "state": state}) if as_json else state)
