"""Makes the demo checkpoint: `python -m oasst_training.train_demo [--output DIR]`.

It learns a tokenizer and a tiny GPT-NeoX from `dialogues.jsonl`, rounds the weights to fp16, checks that greedy
decoding then gives every reply with a wide margin in fp32 and in bf16, and only then writes the checkpoint.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM
from transformers.utils import logging as transformers_logging

from oasst_training.collator import DialogueCollator, collator_for
from oasst_training.curriculum import Curriculum
from oasst_training.dialogues import DIALOGUES_PATH, Dialogue, load_dialogues
from oasst_training.model import ModelShape, build_model, export_model
from oasst_training.recall import Recall, measure_recall
from oasst_training.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from oasst_training.trainer import Progress, TrainingConfig, train

__all__ = ["DEMO_CHECKPOINT", "main", "make_demo_tokenizer"]

# Where the repository keeps the checkpoint that this command made.
DEMO_CHECKPOINT = Path(__file__).with_name("demo")

_VOCAB_SIZE = 2040
_SHAPE = ModelShape(num_layers=4, hidden_size=192, num_heads=6)
_NUM_STEPS = 1100
_SMALLEST_MARGIN = 1.0
_REPORT_EVERY_STEPS = 20

# Chats that the training did not see in this order, to measure how well replies are found after earlier ones.
_NUM_CHATS = 50
_CHAT_LENGTH = 512
_CHATS_SEED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, verifies and writes the checkpoint. Returns the exit code: 1 if a reply is not recalled for sure."""
    options = _parse_options(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped.
    dialogues = load_dialogues(options.dialogues)
    tokenizer = make_demo_tokenizer(dialogues)
    model = build_model(_SHAPE, tokenizer, seed=options.seed)
    collator = collator_for(tokenizer)
    config = TrainingConfig(num_steps=options.steps, seed=options.seed, num_threads=options.threads)
    train(model, Curriculum(dialogues, tokenizer), collator, config, _print_progress)

    with TemporaryDirectory() as staging:
        checkpoint = Path(staging)
        save_tokenizer(tokenizer, checkpoint)
        export_model(model, checkpoint)
        if not _verify(checkpoint, dialogues, collator):
            print("a reply is missing or its margin is small: nothing is written, try more steps", file=sys.stderr)
            return 1
        options.output.mkdir(parents=True, exist_ok=True)
        for file in checkpoint.iterdir():
            shutil.copyfile(file, options.output / file.name)
    print(f"wrote {options.output}")
    return 0


def make_demo_tokenizer(dialogues: Iterable[Dialogue]) -> Tokenizer:
    """The demo checkpoint's tokenizer, learned from the dialogues in every wording."""
    texts = [text for each in dialogues for text in (*each.wordings, *(turn.text for turn in each.turns))]
    return make_tokenizer(texts, vocab_size=_VOCAB_SIZE)


def _parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m oasst_training.train_demo", description="Makes a demo checkpoint.")
    parser.add_argument("--output", type=Path, default=DEMO_CHECKPOINT, help="folder to write the checkpoint to")
    parser.add_argument("--dialogues", type=Path, default=DIALOGUES_PATH, help="JSON lines to learn from")
    parser.add_argument("--steps", type=int, default=_NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="part of the recipe: another number, other last bits")
    return parser.parse_args(argv)


def _print_progress(progress: Progress) -> None:
    if progress.step % _REPORT_EVERY_STEPS == 0 or progress.step == progress.num_steps:
        print(
            f"step {progress.step}/{progress.num_steps}, loss {progress.loss:.4f}, {progress.remaining_s:.0f} s left",
            flush=True,
        )


def _verify(checkpoint: Path, dialogues: Sequence[Dialogue], collator: DialogueCollator) -> bool:
    """Prints how well the files recall the dialogues, and tells whether greedy decoding is sure of every reply."""
    curriculum = Curriculum(dialogues, load_tokenizer(checkpoint))
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
