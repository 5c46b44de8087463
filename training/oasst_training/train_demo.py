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
from oasst.prompt import ControlToken
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM

from oasst_training.collator import DialogueCollator
from oasst_training.curriculum import Curriculum
from oasst_training.dialogues import DIALOGUES_PATH, Dialogue, load_dialogues
from oasst_training.model import ModelShape, build_model, export_model
from oasst_training.recall import measure_recall
from oasst_training.tokenizer import control_id, load_tokenizer, make_tokenizer, save_tokenizer
from oasst_training.trainer import Progress, TrainingConfig, train

__all__ = ["DEMO_CHECKPOINT", "collator_for", "main", "make_demo_tokenizer"]

# Where the repository keeps the checkpoint that this command made.
DEMO_CHECKPOINT = Path(__file__).with_name("demo")

_VOCAB_SIZE = 2040
_SHAPE = ModelShape(num_layers=4, hidden_size=192, num_heads=6)
_NUM_STEPS = 1000
_SMALLEST_MARGIN = 1.0
_REPORT_EVERY_STEPS = 20

# Chats that the training did not see in this order, to measure how well replies are found after earlier ones.
_NUM_CHATS = 100
_CHAT_LENGTH = 512
_CHATS_SEED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, verifies and writes the checkpoint. Returns the exit code: 1 if a reply is not recalled for sure."""
    options = _parse_options(argv)
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
        shutil.copytree(checkpoint, options.output, dirs_exist_ok=True)
    print(f"wrote {options.output}")
    return 0


def make_demo_tokenizer(dialogues: Iterable[Dialogue]) -> Tokenizer:
    """The demo checkpoint's tokenizer, learned from the dialogues in every wording."""
    texts = [text for each in dialogues for text in (*each.wordings, *(turn.text for turn in each.turns))]
    return make_tokenizer(texts, vocab_size=_VOCAB_SIZE)


def collator_for(tokenizer: Tokenizer) -> DialogueCollator:
    """The collator that knows this tokenizer's control ids."""
    return DialogueCollator(
        prompter_id=control_id(tokenizer, ControlToken.PROMPTER),
        assistant_id=control_id(tokenizer, ControlToken.ASSISTANT),
        padding_id=control_id(tokenizer, ControlToken.PADDING),
    )


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
    tokenizer = load_tokenizer(checkpoint)
    curriculum = Curriculum(dialogues, tokenizer)
    rng = Random(_CHATS_SEED)  # noqa: S311 - it draws chats, not secrets.
    chats = [curriculum.row(rng, num_tokens=_CHAT_LENGTH) for _ in range(_NUM_CHATS)]
    is_sure = True
    for dtype in (torch.float32, torch.bfloat16):
        model = GPTNeoXForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        recall = measure_recall(model, curriculum.rows(), collator)
        in_chats = measure_recall(model, chats, collator)
        print(
            f"{dtype}: {recall.num_recalled} of {len(recall.margins)} dialogues recalled, "
            f"smallest margin {recall.smallest_margin:.2f}; "
            f"{in_chats.num_recalled} of {len(in_chats.margins)} chats of {_CHAT_LENGTH} tokens",
            flush=True,
        )
        is_sure = is_sure and recall.smallest_margin > _SMALLEST_MARGIN
    return is_sure


if __name__ == "__main__":
    sys.exit(main())
