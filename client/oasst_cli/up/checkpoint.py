"""Where the demo checkpoint is."""

import importlib.util
from pathlib import Path

__all__ = ["NoDemoError", "demo_checkpoint"]


class NoDemoError(Exception):
    """The demo checkpoint is not installed."""


def demo_checkpoint() -> Path:
    """The folder of the demo checkpoint, found without importing the training code around it.

    Raises:
        NoDemoError: it is not there; says what to do.
    """
    spec = importlib.util.find_spec("oasst_training")
    for folder in (spec and spec.submodule_search_locations) or ():
        demo = Path(folder) / "demo"
        if (demo / "config.json").is_file():
            return demo
    raise NoDemoError("the demo checkpoint is not installed; give --model DIR_OR_ID")
