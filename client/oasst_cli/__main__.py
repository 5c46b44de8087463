"""The `oasst` command."""

import os
import sys

# gRPC's own log lines are for its developers; what went wrong is told by the errors. Set before gRPC is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer
from oasst_client import OasstError

from oasst_cli.chat import chat
from oasst_cli.complete import complete
from oasst_cli.models import models
from oasst_cli.plan.command import plan
from oasst_cli.up import up

__all__ = ["app", "main"]

_EXIT_CODES = (
    "Exit codes: 0, done or stopped as asked; 1, a question or a process failed; "
    "2, an option, or the model, can never work."
)

app = typer.Typer(
    name="oasst",
    help="Run and use a self-hosted OpenAssistant chat service.",
    epilog=_EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (up, chat, complete, models, plan):
    app.command(epilog=_EXIT_CODES)(command)


def main() -> None:
    """Runs the command; what the service refused is told in one line."""
    try:
        app()
    except OasstError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
