"""The data sets of a recipe: rows of token ids to train on, and others, never trained on, to evaluate on."""

import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import TypeVar, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from oasst.prompt import Turn
from tokenizers import Tokenizer
from torch.utils.data import Dataset, random_split

from oasst_training.curriculum import Curriculum
from oasst_training.dialogues import format_dialogue, load_dialogues
from oasst_training.errors import DataError, RecipeError
from oasst_training.instructions import read_instructions
from oasst_training.message_trees import read_threads
from oasst_training.recipe import AlpacaSpec, DataSetSpec, DialoguesSpec, OasstExportSpec, Recipe, find_file
from oasst_training.tokenizer import encode_parts

__all__ = ["DataSet", "Row", "load_datasets", "split"]

# A conversation as token ids, four bytes each.
Row = Sequence[int]
Item = TypeVar("Item")

# The original's, so that the same trees are split alike.
_SPLIT_SEED = 287631038922
_ALPACA_REPO, _ALPACA_FILE = "yahma/alpaca-cleaned", "alpaca_data_cleaned.json"


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set's rows."""

    name: str
    training: list[Row]
    validation: list[Row]


def load_datasets(recipe: Recipe, tokenizer: Tokenizer, folders: Sequence[Path]) -> list[DataSet]:
    """The recipe's data sets, in its order. Relative file names are looked for in these folders.

    Raises:
        RecipeError: if a file is missing, or nothing is left to train on.
        DataError: naming the file and line, or the data set, that is not what it should be.
    """
    loaded = []
    for index, spec in enumerate(recipe.datasets):
        try:
            loaded.append(_load(spec, tokenizer, recipe, folders))
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise DataError(f"datasets.{index}: {spec.name} cannot be read: {error}") from error
    names = _distinct([spec.name for spec in recipe.datasets])
    datasets = [DataSet(name, *rows) for name, rows in zip(names, loaded, strict=True)]
    if not any(dataset.training for dataset in datasets):
        raise RecipeError("datasets: there is nothing in them to train on")
    return datasets


def split(items: Sequence[Item], val_split: float) -> tuple[list[Item], list[Item]]:
    """The items for training and, about `val_split` of them, for validation; always the same ones."""
    if not items or not val_split:
        return list(items), []
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    everything: Dataset[Item] = cast(Dataset[Item], items)  # Only its length is looked at.
    training, validation = random_split(everything, [1.0 - val_split, val_split], generator)
    return [items[index] for index in training.indices], [items[index] for index in validation.indices]


def _load(
    spec: DataSetSpec, tokenizer: Tokenizer, recipe: Recipe, folders: Sequence[Path]
) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those to validate on."""
    match spec:
        case OasstExportSpec():
            path = find_file(spec.input_file_path, folders, key="datasets")
            # Threads of one tree must not stand on both sides.
            trees = split(list(read_threads(path, spec.lang.split(","))), spec.val_split)
            training, validation = (chain.from_iterable(side) for side in trees)
            return _encode(training, tokenizer), _encode(validation, tokenizer)
        case AlpacaSpec():
            path = _alpaca_file(spec, recipe, folders)
            exchanges = split([instruction.turns() for instruction in read_instructions(path)], spec.val_split)
            return _encode(exchanges[0], tokenizer), _encode(exchanges[1], tokenizer)
        case DialoguesSpec():
            path = find_file(spec.input_file_path, folders, key="datasets")
            known, held_out = split(load_dialogues(path), spec.val_split)
            curriculum = Curriculum(known, tokenizer, casual_probability=spec.casual_probability)
            rng = Random(recipe.rng_seed)  # noqa: S311 - it draws dialogues, not secrets.
            chats = [curriculum.row(rng, num_tokens=rng.choice(spec.chat_lengths)) for _ in range(spec.num_chats)]
            return list(chats), list(Curriculum(held_out, tokenizer).rows())


def _encode(conversations: Iterable[Sequence[Turn]], tokenizer: Tokenizer) -> list[Row]:
    return [array("i", encode_parts(tokenizer, format_dialogue(turns))) for turns in conversations]


def _alpaca_file(spec: AlpacaSpec, recipe: Recipe, folders: Sequence[Path]) -> Path:
    if spec.input_file_path:
        return find_file(spec.input_file_path, folders, key="datasets")
    try:
        return Path(hf_hub_download(_ALPACA_REPO, _ALPACA_FILE, repo_type="dataset", cache_dir=recipe.cache_dir))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise RecipeError(
            "datasets: alpaca cannot be downloaded from the hub; give its file as `input_file_path`"
        ) from error


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before: a recipe may have several sets of a kind."""
    return [
        name if name not in names[:index] else f"{name}_{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]
