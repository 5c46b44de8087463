"""DeepSpeed's ZeRO, set up by a file such as the original's `zero_config.json`."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import DeepSpeedPlugin

from oasst_training.errors import RecipeError
from oasst_training.recipe import Recipe, find_file

__all__ = ["fill_config", "zero_plugin"]

# From stage 3 on no process has whole weights, which exporting needs.
_LAST_STAGE = 2


def zero_plugin(recipe: Recipe, folders: Sequence[Path]) -> DeepSpeedPlugin:
    """What tells accelerate to train with DeepSpeed, by the recipe's `deepspeed_config`.

    Raises:
        RecipeError: if DeepSpeed is not installed or not launched, or the file cannot be used.
    """
    if find_spec("deepspeed") is None:
        raise RecipeError("--deepspeed: DeepSpeed is not installed; `pip install deepspeed`, or train without the flag")
    if "LOCAL_RANK" not in os.environ:
        raise RecipeError("--deepspeed: start it by `torchrun --nproc-per-node GPUS -m oasst_training ...`")
    config = fill_config(_read_config(recipe.deepspeed_config, folders), recipe)
    return DeepSpeedPlugin(hf_ds_config=config)


def fill_config(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The configuration with the recipe's value wherever it says "auto", and without the scheduler.

    The learning rate is set by this recipe's own schedule, which is the same as the original file's WarmupDecayLR.

    Raises:
        RecipeError: naming what this recipe cannot do.
    """
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage > _LAST_STAGE:
        raise RecipeError(f"deepspeed_config: zero_optimization.stage is {stage}; 0 to {_LAST_STAGE} can be used")
    scheduler = config.get("scheduler", {}).get("type", "WarmupDecayLR")
    if scheduler != "WarmupDecayLR":
        raise RecipeError(f"deepspeed_config: scheduler.type is {scheduler}; only WarmupDecayLR can be used")
    values = {
        "fp16": {"enabled": recipe.dtype == "fp16"},
        "bf16": {"enabled": recipe.dtype == "bf16"},
        "optimizer": {
            "params": {
                "lr": recipe.learning_rate,
                "betas": [recipe.adam_beta1, recipe.adam_beta2],
                "eps": recipe.adam_epsilon,
                "weight_decay": recipe.weight_decay,
            }
        },
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm,
        "train_micro_batch_size_per_gpu": recipe.per_device_train_batch_size,
    }
    left_out = {"scheduler"}
    if config.get("train_batch_size") == "auto":
        left_out.add("train_batch_size")  # DeepSpeed knows the number of processes.
    return {key: _fill(value, values.get(key), key) for key, value in config.items() if key not in left_out}


def _fill(setting: Any, value: Any, path: str) -> Any:
    """The setting, with `value` in the place of "auto", all the way down."""
    if isinstance(setting, dict):
        below = value if isinstance(value, dict) else {}
        return {key: _fill(each, below.get(key), f"{path}.{key}") for key, each in setting.items()}
    if setting != "auto":
        return setting
    if value is None:
        raise RecipeError(f'deepspeed_config: {path} is "auto", but the recipe has no value for it')
    return value


def _read_config(path: Path | None, folders: Sequence[Path]) -> dict[str, Any]:
    if path is None:
        raise RecipeError("--deepspeed: the recipe has no deepspeed_config")
    file = find_file(path, folders, key="deepspeed_config")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"deepspeed_config: {file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed_config: {file} must hold an object")
    return config
