"""The recipe: blocks of a YAML file in the original's form, and what is refused in them."""

from pathlib import Path

import pytest
from oasst_training.errors import RecipeError
from oasst_training.recipe import AlpacaSpec, OasstExportSpec, Recipe, load_recipe


def test_blocks_in_the_originals_form_make_a_recipe(recipes_path):
    recipe = load_recipe(recipes_path, ["base", "data", "large"])
    assert recipe.rng_seed == 0xA1221F97
    assert (recipe.adam_epsilon, recipe.max_grad_norm) == (1e-12, 2.0)
    assert recipe.output_dir == Path("saved_model")
    export = OasstExportSpec(lang="de,en", input_file_path=Path("trees.jsonl.gz"), val_split=0.05)
    assert recipe.datasets == (export, AlpacaSpec(val_split=0.2))


def test_a_later_block_overrules_an_earlier_one_and_an_override_them_all(recipes_path):
    recipe = load_recipe(recipes_path, ["base", "data", "large"], ["max_length=64", "save_total_limit="])
    assert recipe.learning_rate == 6e-6
    assert recipe.dtype == "bf16"
    assert recipe.max_length == 64
    assert recipe.save_total_limit is None


def test_extra_data_sets_are_joined_to_those_of_earlier_blocks(recipes_path):
    recipe = load_recipe(recipes_path, ["base", "data", "large", "more_data"])
    assert [spec.name for spec in recipe.datasets] == ["oasst_export", "alpaca", "alpaca"]
    assert recipe.datasets[-1].val_split == 0.1


def test_a_key_left_out_has_the_value_of_the_originals_defaults(recipes_path):
    written = load_recipe(recipes_path, ["base"], ["datasets=[alpaca]", "model_name=base"])
    left_out = Recipe(model_name="base", datasets=[AlpacaSpec()])
    differing = {name for name, value in left_out if value != getattr(written, name)}
    # Keys that change nothing by themselves.
    assert differing == {"deepspeed_config", "log_wandb", "system_prefix"}


@pytest.mark.parametrize(
    ("blocks", "overrides", "message"),
    [
        (["base", "no_such_block"], [], "no block 'no_such_block'; it has base, data"),
        (["misspelt"], [], "block 'misspelt' .*: unknown key learning_rats"),
        (["tiny"], ["warm_up=3"], "the overrides: unknown key warm_up"),
        (["tiny"], ["warmup_steps"], "'warmup_steps' must have the form KEY=VALUE"),
        (["tiny"], [], "model_name: is missing"),
        (["base", "large"], [], r"datasets.0: unknown data set 'webgpt'; known are 'oasst_export', 'alpaca'"),
        (["tiny"], ["datasets=[alpaca: {top_k: 1}]"], r"datasets.0.alpaca.top_k: unknown key"),
        (["tiny"], ["datasets=alpaca"], "datasets: "),
        (["tiny"], ["datasets=[alpaca: 5]"], "datasets: .*the options of alpaca must be keys with values"),
        (["base", "large", "more_data"], ["datasets="], "datasets: .*, not None"),
        (["tiny"], ["learning_rate=fast"], "learning_rate: .* not 'fast'"),
        (["tiny"], ["num_train_epochs=0"], "num_train_epochs: .* greater than 0, not 0"),
        (["tiny"], ["dtype=int8"], "dtype: .*'fp16', 'bf16' or 'fp32', not 'int8'"),
        (["tiny"], ["quantization=true"], "quantization: Input should be False, not True"),
        (["tiny"], ["use_system_prefix=true"], "use_system_prefix: Input should be False, not True"),
    ],
)
def test_what_cannot_be_used_is_named(recipes_path, blocks, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipes_path, blocks, overrides)


@pytest.mark.parametrize("text", ["a: [", "just text", "- a list"])
def test_a_file_that_holds_no_blocks_is_named(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(path, ["base"])
