"""DeepSpeed's file, in the original's form."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from oasst_training.__main__ import main
from oasst_training.errors import RecipeError
from oasst_training.zero import fill_config

ZERO_CONFIG = Path(__file__).with_name("zero_config.json")


@pytest.fixture
def config():
    return json.loads(ZERO_CONFIG.read_text())


def test_what_the_file_leaves_open_is_filled_by_the_recipe(config, tiny_recipe):
    assert fill_config(config, tiny_recipe(weight_decay=0.1, dtype="bf16")) == {
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-12, "weight_decay": 0.1},
        },
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e9},
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 2.0,
        "train_micro_batch_size_per_gpu": 4,
    }  # And without the scheduler, which is the recipe's, and the batch size, which depends on the processes.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3; 0 to 2 can be used"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type is OneCycle; only WarmupDecayLR can be used"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 'reduce_bucket_size is "auto", but'),
    ],
)
def test_what_this_recipe_cannot_do_is_named(config, tiny_recipe, change, message):
    with pytest.raises(RecipeError, match=f"deepspeed_config: .*{message}"):
        fill_config(config | change, tiny_recipe())


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_the_command_says_so_before_it_loads_the_model(recipes_path, tmp_path, capsys):
    overrides = ["--set", "model_name=/nowhere", "--set", f"output_dir={tmp_path / 'run'}"]
    assert main([str(recipes_path), "--configs", "tiny", *overrides, "--deepspeed"]) == 2
    assert "DeepSpeed is not installed; `pip install deepspeed`" in capsys.readouterr().err
