"""Training against transformers' Trainer: same weights, rows, batches and optimizer, fp32; tokens per second, memory.

Each run is a process of its own, `python -m bench.training SYSTEM SHAPE STEPS`, so that memory is its own too.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from oasst_training.collator import DialogueCollator
from oasst_training.recipe import AlpacaSpec, Recipe
from oasst_training.sampling import SampleOrder
from oasst_training.schedule import learning_rate_factor
from oasst_training.trainer import Trainer
from rich.table import Table
from torch.utils.data import Dataset, SequentialSampler
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments
from transformers import Trainer as TheirTrainer

from bench.checkpoints import DEMO, SHAPES, VOCAB_SIZE
from bench.options import Measured, Options
from bench.turns import Ratio, paired_ratio, turns

__all__ = ["OURS", "THEIRS", "TrainingRow", "measure", "training_table"]

OURS, THEIRS = "oasst-train", "transformers Trainer"
_TRAINED_SHAPES = ("demo", "70m")
_WARM_UP_STEPS = 2
_ROWS_PER_MICRO_BATCH = 4
# Lengths of questions and answers, in tokens.
_SHORTEST, _LONGEST = 20, 160
_PROMPTER, _ASSISTANT, _END, _PADDING = 2, 3, 0, 1


@dataclass(frozen=True)
class TrainingRow:
    """One shape: what each system did per second, and its memory at most."""

    shape: str
    tokens_per_s: dict[str, float]  # Without padding.
    peak_mib: dict[str, float]
    last_loss: dict[str, float]
    ratio: Ratio  # Of our tokens per second to theirs.


def measure(options: Options) -> Measured:
    rows = [_measure(shape, steps=options.training_steps, rounds=options.rounds) for shape in _TRAINED_SHAPES]
    return rows, [training_table(rows)]


def _measure(shape: str, *, steps: int, rounds: int) -> TrainingRow:
    """The systems take turns, round by round."""
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for _, system in turns([OURS, THEIRS], rounds, warms_up=False):  # Each run leaves out its first steps.
        command = [sys.executable, "-m", "bench.training", system, shape, str(steps)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        runs[system].append(json.loads(output.splitlines()[-1]))

    def medians(figure: str) -> dict[str, float]:
        return {system: statistics.median(result[figure] for result in results) for system, results in runs.items()}

    ours, theirs = ([result["tokens_per_s"] for result in runs[system]] for system in (OURS, THEIRS))
    row = TrainingRow(
        shape, medians("tokens_per_s"), medians("peak_mib"), medians("last_loss"), paired_ratio(ours, theirs)
    )
    if abs(row.last_loss[OURS] - row.last_loss[THEIRS]) > 1e-3:
        raise RuntimeError(f"the losses differ, {row.last_loss}: the work would not be equal")
    return row


def training_table(rows: list[TrainingRow]) -> Table:
    table = Table(title="Training: tokens per second without padding, fp32; most memory of the process")
    for heading in ("shape", OURS, THEIRS, "ratio", "memory", "their memory"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.shape,
            f"{row.tokens_per_s[OURS]:.0f}",
            f"{row.tokens_per_s[THEIRS]:.0f}",
            str(row.ratio),
            f"{row.peak_mib[OURS]:.0f} MiB",
            f"{row.peak_mib[THEIRS]:.0f} MiB",
        )
    return table


def _run_one(system: str, shape: str, steps: int) -> dict[str, float]:
    """Trains in this process and returns the figures."""
    recipe = Recipe(
        model_name=shape,
        datasets=(AlpacaSpec(),),
        per_device_train_batch_size=_ROWS_PER_MICRO_BATCH,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=1e-3,
        warmup_steps=0,
        residual_dropout=0.0,
        fuse_gelu=False,
        dtype="fp32",
    )
    model = _make_model(shape)
    rows = _make_rows(steps * _ROWS_PER_MICRO_BATCH, model.config.vocab_size)
    train = {OURS: _train_ours, THEIRS: _train_theirs}[system]
    step_s, last_loss = train(model, rows, recipe, steps)
    tokens_per_step = sum(map(len, rows)) / steps
    return {
        "tokens_per_s": tokens_per_step / statistics.mean(step_s[_WARM_UP_STEPS:]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "last_loss": last_loss,
    }


def _train_ours(
    model: GPTNeoXForCausalLM, rows: list[list[int]], recipe: Recipe, steps: int
) -> tuple[list[float], float]:
    torch.use_deterministic_algorithms(True)  # As a run on a CPU does.
    trainer = Trainer(Accelerator(cpu=True), model, rows, _COLLATOR, recipe)
    step_s = []
    loss = 0.0
    for step in range(steps):
        start = time.perf_counter()
        loss = trainer.step(step).loss.item()
        step_s.append(time.perf_counter() - start)
    return step_s, loss


def _train_theirs(
    model: GPTNeoXForCausalLM, rows: list[list[int]], recipe: Recipe, steps: int
) -> tuple[list[float], float]:
    # With our schedule and order, so that both do the same.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, fused=True
    )
    factor = partial(learning_rate_factor, num_warmup_steps=recipe.warmup_steps, num_steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = SampleOrder([len(row) for row in rows], batch_size=_ROWS_PER_MICRO_BATCH, seed=recipe.rng_seed)
    ordered = [rows[index] for step in range(steps) for index in order.micro_batch(step)]
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=_ROWS_PER_MICRO_BATCH,
            max_grad_norm=recipe.max_grad_norm,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = _InOrder(
            model=model,
            args=arguments,
            train_dataset=_Rows(ordered),
            data_collator=_collate_theirs,
            optimizers=(optimizer, schedule),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.step_s, clock.losses[-1]


class _InOrder(TheirTrainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _Rows(Dataset[list[int]]):
    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[int]:
        return self._rows[index]


class _StepClock(TrainerCallback):
    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self._last_s = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last_s = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now_s = time.perf_counter()
        self.step_s.append(now_s - self._last_s)
        self._last_s = now_s

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


_COLLATOR = DialogueCollator(_PROMPTER, _ASSISTANT, _PADDING)


def _collate_theirs(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    batch = _COLLATOR(rows, Random(0))
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:] = batch.targets[:, :-1].masked_fill(~batch.label_mask[:, :-1], -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "labels": labels}


def _make_model(shape: str) -> GPTNeoXForCausalLM:
    if shape == "demo":
        config = GPTNeoXConfig.from_pretrained(DEMO)
    else:
        sizes = SHAPES[shape]
        config = GPTNeoXConfig(vocab_size=VOCAB_SIZE, intermediate_size=4 * sizes["hidden_size"], **sizes)
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(config).float()


def _make_rows(count: int, vocab_size: int) -> list[list[int]]:
    """Random exchanges of one question and one answer."""
    rng = Random(0)

    def text() -> list[int]:
        return [rng.randrange(300, vocab_size - 100) for _ in range(rng.randint(_SHORTEST, _LONGEST))]

    return [[_PROMPTER, *text(), _END, _ASSISTANT, *text(), _END] for _ in range(count)]


if __name__ == "__main__":
    print(json.dumps(_run_one(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
