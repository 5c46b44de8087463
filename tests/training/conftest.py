"""What the tests of the training share: the project's dialogues and what is made of them."""

from pathlib import Path

import pytest
from oasst_training.dialogues import Dialogue, load_dialogues
from oasst_training.train_demo import DEMO_CHECKPOINT, make_demo_tokenizer
from tokenizers import Tokenizer


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
