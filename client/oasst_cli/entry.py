"""What the script `oasst` starts: the command, or what to install for it.

The SDK comes without the packages of the command; the script comes with both.
"""

import sys

__all__ = ["main"]


def main() -> None:
    """Runs the command; a package that it lacks is told in one line."""
    try:
        from oasst_cli.__main__ import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("oasst"):
            raise  # It would be a fault of ours.
        print(f"error: oasst needs {error.name}: pip install '.[cli]' in a clone of oasst-serve", file=sys.stderr)
        sys.exit(2)
    run()
