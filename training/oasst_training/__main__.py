"""`oasst-train RECIPE.yaml --configs BLOCK ...`: trains a model by the recipe that these blocks make."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from oasst_training.errors import TrainingError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 2 if something must be changed first."""
    options = _parse_options(argv)
    try:
        from oasst_training.recipe import load_recipe
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("oasst"):
            raise  # It would be a fault of ours.
        print(f"oasst-train needs {error.name}: pip install '.[train]' in a clone of oasst-serve", file=sys.stderr)
        return 2
    try:
        recipe = load_recipe(options.recipe, options.configs, options.set)
        # Not above: PyTorch takes seconds to load, and a misspelt key should not.
        from transformers.utils import logging as transformers_logging

        from oasst_training.run import run_recipe

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped.
        folders = (options.recipe.resolve().parent, recipe.cache_dir)
        model = run_recipe(recipe, folders, resume=options.resume, deepspeed=options.deepspeed)
    except TrainingError as error:
        print(f"oasst-train: {error}", file=sys.stderr)
        return 2
    print(f"wrote {model}; serve it with `oasst up --model {model}`")
    return 0


def _parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="oasst-train", description="Trains a GPT-NeoX chat model by a recipe of Open-Assistant's form."
    )
    parser.add_argument("recipe", type=Path, help="YAML file of named blocks of keys")
    parser.add_argument("--configs", nargs="+", required=True, metavar="BLOCK", help="blocks, later ones overrule")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrules a key of all blocks; repeatable"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in output_dir, if any")
    parser.add_argument("--deepspeed", action="store_true", help="train with DeepSpeed, by the recipe's file for it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
