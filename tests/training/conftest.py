"""What the tests of the training share: the project's dialogues, a tiny checkpoint, and a recipe that trains it."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from oasst_training.dialogues import Dialogue, load_dialogues
from oasst_training.model import ModelShape, build_model, export_model
from oasst_training.recipe import Recipe, load_recipe
from oasst_training.tokenizer import save_tokenizer
from oasst_training.train_demo import DEMO_CHECKPOINT, make_demo_tokenizer
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def torch_settings_are_put_back() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    AcceleratorState._reset_state(True)  # Else a run with another precision would be refused.


@pytest.fixture(scope="session")
def dialogues() -> list[Dialogue]:
    return load_dialogues()


@pytest.fixture(scope="session")
def tokenizer(dialogues: list[Dialogue]) -> Tokenizer:
    """Made anew from the dialogues."""
    return make_demo_tokenizer(dialogues)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The folder that is kept in the repository."""
    return DEMO_CHECKPOINT


@pytest.fixture(scope="session")
def recipes_path() -> Path:
    """Recipes in the original's form."""
    return HERE / "recipes.yaml"


@pytest.fixture(scope="session")
def trees_path() -> Path:
    """Message trees with every kind of leaf."""
    return HERE / "trees.jsonl"


@pytest.fixture(scope="session")
def make_tiny_model(tokenizer: Tokenizer) -> Callable[[], GPTNeoXForCausalLM]:
    """Makes an untrained model that trains in milliseconds, always the same one."""
    return partial(build_model, ModelShape(num_layers=2, hidden_size=32, num_heads=2), tokenizer, seed=0)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    make_tiny_model: Callable[[], GPTNeoXForCausalLM], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with that model."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tokenizer(tokenizer, folder)
    export_model(make_tiny_model(), folder, "fp32")
    return folder


@pytest.fixture(scope="session")
def data_folder(dialogues: list[Dialogue], trees_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the recipe `tiny` names."""
    folder = tmp_path_factory.mktemp("data")
    instructions = [
        {"instruction": dialogue.question, "input": "", "output": dialogue.turns[1].text} for dialogue in dialogues[:60]
    ]
    lines = (json.dumps(instruction) + "\n" for instruction in instructions)
    (folder / "instructions.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.copyfile(trees_path, folder / "trees.jsonl")
    return folder


@pytest.fixture
def tiny_recipe(recipes_path: Path, tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`tiny_recipe(learning_rate=1)` is the recipe `tiny`, with this key overruled, writing into `tmp_path / "run"`."""

    def make(**keys: object) -> Recipe:
        fixed = {"model_name": tiny_checkpoint, "output_dir": tmp_path / "run"}
        return load_recipe(recipes_path, ["tiny"], [f"{key}={value}" for key, value in (fixed | keys).items()])

    return make
