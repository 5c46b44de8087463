"""A whole training run, from a recipe to a model that the worker serves.

output_dir/
    recipe.json               every key as it was used
    loss_curve.json, .png     the history so far
    checkpoint-00000200/      to go on from, see `checkpoints`; its `model/` can be served
    model/                    the trained model, at the end
"""

import hashlib
import math
import shutil
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from oasst.prompt import ControlToken
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM

from oasst_training.checkpoints import CheckpointFolder
from oasst_training.collator import collator_for
from oasst_training.datasets import DataSet, Row, load_datasets
from oasst_training.errors import CheckpointError, DivergedError, RecipeError
from oasst_training.evaluation import evaluate
from oasst_training.loss_curve import EvaluationPoint, LossCurve, StepPoint, can_draw
from oasst_training.model import export_model, load_base, set_residual_dropout, use_tanh_gelu
from oasst_training.progress import Progress
from oasst_training.recipe import Recipe
from oasst_training.tokenizer import control_id, save_tokenizer
from oasst_training.trainer import StepResult, Trainer
from oasst_training.zero import zero_plugin

__all__ = ["run_recipe"]

# Keys of the recipe that a resumed run may change: they do not decide on the weights, or the data's digest speaks for
# them, or (accumulation) the number of micro batches in a step.
_CHANGEABLE_KEYS = {
    *("datasets", "datasets_extra", "gradient_accumulation_steps"),
    *("output_dir", "cache_dir", "log_dir", "log_wandb", "verbose", "export_dtype", "deepspeed_config"),
    *("logging_steps", "eval_steps", "eval_size", "per_device_eval_batch_size", "eval_accumulation_steps"),
    *("save_steps", "save_total_limit"),
}


# gloo's thread drops a barrier's tensors after everybody was let through, and needs the interpreter's lock for it. The
# end of the process group holds that lock and waits for the thread: for ever, if it comes in between.
_BARRIER_ENDS_S = 0.2


def run_recipe(recipe: Recipe, folders: Sequence[Path], *, resume: bool = False, deepspeed: bool = False) -> Path:
    """Trains as the recipe says and returns the folder of the trained model.

    Relative names of data files are looked for in `folders`. With `resume` the run goes on from the last checkpoint in
    `output_dir`, or begins if there is none: on a CPU it ends with the same weights, bit for bit, as if it had never
    been interrupted.

    Raises:
        TrainingError: naming what to change.
    """
    _check_output(recipe.output_dir, resume=resume)
    accelerator = _make_accelerator(recipe, folders, deepspeed=deepspeed)
    model, tokenizer = load_base(recipe.model_name, recipe.cache_dir, seed=recipe.rng_seed)
    datasets = load_datasets(recipe, tokenizer, folders)
    return _Run(accelerator, recipe, model, tokenizer, datasets).train(resume=resume)


class _Run:
    """The run of one process. Files are written by the main process alone."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        model: GPTNeoXForCausalLM,
        tokenizer: Tokenizer,
        datasets: Sequence[DataSet],
    ) -> None:
        self._accelerator = accelerator
        self._recipe = recipe
        self._model = _prepare_model(model, recipe)
        self._tokenizer = tokenizer
        self._datasets = datasets
        self._collator = replace(
            collator_for(tokenizer),
            max_length=recipe.max_length,
            random_offset_probability=recipe.random_offset_probability,
            label_masking=recipe.label_masking,
        )
        rows = [row for dataset in datasets for row in dataset.training]
        self._trainer = Trainer(accelerator, model, rows, self._collator, recipe)
        self._checkpoints = CheckpointFolder(recipe.output_dir, _identity(recipe, rows, self._trainer))
        self._curve = LossCurve()
        self._pending: list[StepResult] = []

    def train(self, *, resume: bool) -> Path:
        first_step = self._resume() if resume else 0
        self._begin()
        progress = Progress(
            num_steps=self._trainer.num_steps, first_step=first_step, is_shown=self._accelerator.is_main_process
        )
        for dataset in self._datasets:
            progress.say(f"{dataset.name}: {len(dataset.training)} for training, {len(dataset.validation)} held out")
        for step in range(first_step + 1, self._trainer.num_steps + 1):
            self._pending.append(self._trainer.step(step - 1))
            progress.advance()
            is_last = step == self._trainer.num_steps
            if is_last or step % self._recipe.logging_steps == 0:
                self._log(step, progress)
            if is_last or step % self._recipe.eval_steps == 0:
                self._evaluate(step, progress)
            if step % self._recipe.save_steps == 0:
                self._save(step, progress)
        progress.close()
        return self._finish()

    def _resume(self) -> int:
        """The state of the last checkpoint is in place. Returns its step, 0 if there is none."""
        checkpoint = self._checkpoints.latest()
        if checkpoint is None:
            return 0
        self._accelerator.load_state(str(checkpoint.state))
        self._curve = LossCurve.read(self._recipe.output_dir, until_step=checkpoint.step)
        return checkpoint.step

    def _begin(self) -> None:
        if self._accelerator.is_main_process:
            self._recipe.output_dir.mkdir(parents=True, exist_ok=True)
            self._checkpoints.clean()
            recipe = self._recipe.model_dump_json(indent=1)
            (self._recipe.output_dir / "recipe.json").write_text(recipe + "\n", encoding="utf-8")
        self._accelerator.wait_for_everyone()

    def _log(self, step: int, progress: Progress) -> None:
        """The curve has the losses of all steps up to this one, as means over all processes.

        Raises:
            DivergedError: if one of them is no number.
        """
        if not self._pending:
            return
        losses = self._accelerator.reduce(torch.stack([result.loss for result in self._pending]), "mean").tolist()
        first = step - len(losses) + 1
        for number, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                raise DivergedError(f"the loss of step {number} is {loss}: lower learning_rate, or use another dtype")
            rate = self._trainer.learning_rate(number - 1)
            self._curve.steps.append(StepPoint(number, self._trainer.epoch_after(number), rate, loss))
        own_tokens = sum(result.num_tokens for result in self._pending)
        progress.tell_step(self._curve.steps[-1], num_tokens=own_tokens * self._accelerator.num_processes)
        self._pending.clear()
        self._write_curve()

    def _evaluate(self, step: int, progress: Progress) -> None:
        self._log(step, progress)
        for dataset in self._datasets:
            if not dataset.validation:
                continue
            evaluation = evaluate(
                self._accelerator,
                self._accelerator.unwrap_model(self._trainer.module),
                dataset.validation[: self._recipe.eval_size],
                replace(self._collator, random_offset_probability=0.0),
                batch_size=self._recipe.per_device_eval_batch_size,
                end_id=control_id(self._tokenizer, ControlToken.END_OF_TEXT),
            )
            self._curve.evaluations.append(EvaluationPoint(step, dataset.name, evaluation))
            progress.tell_evaluation(dataset.name, evaluation)
        self._write_curve()

    def _write_curve(self) -> None:
        if self._accelerator.is_main_process:
            self._curve.write(self._recipe.output_dir)

    def _save(self, step: int, progress: Progress) -> None:
        self._log(step, progress)
        checkpoint = self._checkpoints.partial(step)
        self._accelerator.save_state(str(checkpoint.state))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            self._export(checkpoint.model)
            self._checkpoints.complete(checkpoint, keep=self._recipe.save_total_limit)
        self._accelerator.wait_for_everyone()

    def _finish(self) -> Path:
        """The trained model and the picture of its loss are in `output_dir`."""
        output = self._recipe.output_dir / "model"
        if self._accelerator.is_main_process:
            partial = output.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            self._export(partial)
            shutil.rmtree(output, ignore_errors=True)
            partial.replace(output)
            if can_draw():
                self._curve.draw(self._recipe.output_dir)
        self._accelerator.wait_for_everyone()
        if self._accelerator.num_processes > 1:
            time.sleep(_BARRIER_ENDS_S)
        self._accelerator.end_training()
        return output

    def _export(self, directory: Path) -> None:
        directory.mkdir()
        save_tokenizer(self._tokenizer, directory)
        export_model(self._model, directory, self._recipe.export_dtype)


def _check_output(output_dir: Path, *, resume: bool) -> None:
    if not resume and (any(output_dir.glob("checkpoint-*")) or (output_dir / "model").exists()):
        raise CheckpointError(f"{output_dir} holds a run already: go on with --resume, or choose another output_dir")


def _make_accelerator(recipe: Recipe, folders: Sequence[Path], *, deepspeed: bool) -> Accelerator:
    has_gpu = torch.cuda.is_available()
    if recipe.dtype == "fp16" and not has_gpu:
        raise RecipeError("dtype: fp16 needs a GPU; on a CPU use bf16 or fp32")
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    if not has_gpu:
        torch.use_deterministic_algorithms(True)
    return Accelerator(
        cpu=not has_gpu and not deepspeed,  # Told to use a CPU, accelerate would quietly leave DeepSpeed out.
        mixed_precision="no" if recipe.dtype == "fp32" else recipe.dtype,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        deepspeed_plugin=zero_plugin(recipe, folders) if deepspeed else None,
        # The loss scale of the original's DeepSpeed file.
        kwargs_handlers=[GradScalerKwargs(init_scale=2.0**16, growth_interval=1000)],
    )


def _prepare_model(model: GPTNeoXForCausalLM, recipe: Recipe) -> GPTNeoXForCausalLM:
    set_residual_dropout(model, recipe.residual_dropout)
    if recipe.fuse_gelu:
        use_tanh_gelu(model)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]  # transformers leaves it untyped.
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    return model


def _identity(recipe: Recipe, rows: Sequence[Row], trainer: Trainer) -> dict[str, Any]:
    """What must be equal for a checkpoint to be one of this run's."""
    return {
        **recipe.model_dump(mode="json", exclude=_CHANGEABLE_KEYS),
        "micro_batches_per_step": trainer.micro_batches_per_step,
        "data_sha256": _digest(rows),
    }


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(4, "little"))
        digest.update(array("i", row).tobytes())
    return digest.hexdigest()
