"""The harness's own command line, with the model `oasst-grpc` in it."""

from lm_eval.__main__ import cli_evaluate

import oasst_cli.eval.model  # noqa: F401  # Registers the model.

if __name__ == "__main__":
    cli_evaluate()
