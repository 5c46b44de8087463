"""The `oasst` command."""

import os
import sys

# gRPC's own log lines are for its developers; what went wrong is told by the errors. Set before gRPC is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer
from oasst_client import OasstError

from oasst_cli.bench.command import bench
from oasst_cli.cancel import cancel
from oasst_cli.chat.command import chat
from oasst_cli.complete import complete
from oasst_cli.doctor import doctor
from oasst_cli.eval.command import evaluate
from oasst_cli.exits import EXIT_CODES, exit_of
from oasst_cli.models import models
from oasst_cli.plan.command import plan
from oasst_cli.report.command import report
from oasst_cli.tokenize import tokenize
from oasst_cli.top.command import top
from oasst_cli.up.command import up

__all__ = ["app", "main"]

app = typer.Typer(
    name="oasst",
    help="Run and use a self-hosted OpenAssistant chat service.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (up, chat, complete, cancel, models, top, tokenize, doctor, bench, report, plan):
    app.command(epilog=EXIT_CODES)(command)
app.command("eval", epilog=EXIT_CODES)(evaluate)


def main() -> None:
    """Runs the command; what the service refused is told in one line."""
    try:
        app()
    except OasstError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_of(error))


if __name__ == "__main__":
    main()
