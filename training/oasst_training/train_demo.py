"""Makes the demo checkpoint by the recipe in `demo.yaml`: `python -m oasst_training.train_demo`.

It learns a tokenizer from `dialogues.jsonl`, makes an untrained GPT-NeoX for it, trains that by the recipe, checks that
greedy decoding then gives every reply with a wide margin in fp32 and in bf16, and only then writes the checkpoint.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM
from transformers.utils import logging as transformers_logging

from oasst_training.collator import collator_for
from oasst_training.curriculum import Curriculum
from oasst_training.dialogues import Dialogue, load_dialogues
from oasst_training.errors import RecipeError, TrainingError
from oasst_training.model import ModelShape, build_model, export_model
from oasst_training.recall import Recall, measure_recall
from oasst_training.recipe import DialoguesSpec, Recipe, find_file, load_recipe
from oasst_training.run import run_recipe
from oasst_training.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer

__all__ = ["DEMO_CHECKPOINT", "DEMO_RECIPE", "main", "make_demo_tokenizer"]

# Where the repository keeps the checkpoint that this command made, and the recipe it was made by.
DEMO_CHECKPOINT = Path(__file__).with_name("demo")
DEMO_RECIPE = Path(__file__).with_name("demo.yaml")

_VOCAB_SIZE = 2040
_SHAPE = ModelShape(num_layers=4, hidden_size=192, num_heads=6)
_SMALLEST_MARGIN = 1.0

# Chats that the training did not see in this order, to measure how well replies are found after earlier ones.
_NUM_CHATS = 50
_CHAT_LENGTH = 512
_CHATS_SEED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, verifies and writes the checkpoint. Returns the exit code: 1 if a reply is not recalled for sure."""
    options = _parse_options(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped.
    base, run = options.work_dir / "base", options.work_dir / "run"
    overrides = [f"model_name={base}", f"output_dir={run}", *options.set]
    try:
        recipe = load_recipe(options.recipe, ["demo"], overrides)
        dialogues = _dialogues_of(recipe, options.recipe.parent)
        _write_base(base, dialogues, seed=recipe.rng_seed)
        trained = run_recipe(recipe, [options.recipe.parent], resume=options.resume)
    except TrainingError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 2
    if not _verify(trained, dialogues):
        print("a reply is missing or its margin is small: nothing is written, try more chats", file=sys.stderr)
        return 1
    shutil.copytree(trained, options.output, dirs_exist_ok=True)
    print(f"wrote {options.output}")
    return 0


def make_demo_tokenizer(dialogues: Iterable[Dialogue]) -> Tokenizer:
    """The demo checkpoint's tokenizer, learned from the dialogues in every wording."""
    texts = [text for each in dialogues for text in (*each.wordings, *(turn.text for turn in each.turns))]
    return make_tokenizer(texts, vocab_size=_VOCAB_SIZE)


def _parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m oasst_training.train_demo", description="Makes a demo checkpoint.")
    parser.add_argument("--output", type=Path, default=DEMO_CHECKPOINT, help="folder to write the checkpoint to")
    parser.add_argument("--recipe", type=Path, default=DEMO_RECIPE, help="YAML file with a block `demo`")
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo"), help="folder of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="overrules a key of the recipe; repeatable"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if any")
    return parser.parse_args(argv)


def _dialogues_of(recipe: Recipe, folder: Path) -> list[Dialogue]:
    """The dialogues that the model has to know: those of the recipe's only data set."""
    match recipe.datasets:
        case [DialoguesSpec() as spec]:
            return load_dialogues(find_file(spec.input_file_path, [folder], key="datasets"))
        case _:
            raise RecipeError("datasets: the demo model learns one set of dialogues")


def _write_base(base: Path, dialogues: Sequence[Dialogue], *, seed: int) -> None:
    """The folder holds an untrained model in full precision and its tokenizer."""
    base.mkdir(parents=True, exist_ok=True)
    tokenizer = make_demo_tokenizer(dialogues)
    save_tokenizer(tokenizer, base)
    export_model(build_model(_SHAPE, tokenizer, seed=seed), base, "fp32")


def _verify(checkpoint: Path, dialogues: Sequence[Dialogue]) -> bool:
    """Prints how well the files recall the dialogues, and tells whether greedy decoding is sure of every reply."""
    tokenizer = load_tokenizer(checkpoint)
    collator = collator_for(tokenizer)
    curriculum = Curriculum(dialogues, tokenizer)
    rng = Random(_CHATS_SEED)  # noqa: S311 - it draws chats, not secrets.
    chats = [curriculum.row(rng, num_tokens=_CHAT_LENGTH) for _ in range(_NUM_CHATS)]
    fp32, bf16 = (
        GPTNeoXForCausalLM.from_pretrained(checkpoint, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    in_fp32, in_bf16 = (measure_recall(model, curriculum.rows(), collator) for model in (fp32, bf16))
    _print_recall("dialogues in fp32", in_fp32)
    _print_recall("dialogues in bf16", in_bf16)
    _print_recall(f"chats of {_CHAT_LENGTH} tokens", measure_recall(fp32, chats, collator))
    return min(in_fp32.smallest_margin, in_bf16.smallest_margin) > _SMALLEST_MARGIN


def _print_recall(what: str, recall: Recall) -> None:
    recalled = f"{recall.num_recalled} of {len(recall.margins)}"
    print(f"{recalled} {what} recalled, smallest margin {recall.smallest_margin:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
