"""The weight files of a checkpoint, found and read tensor by tensor.

Single or sharded safetensors, else single or sharded `pytorch_model.bin` (tensors only: pickled code is refused). One
file is open at a time, so that of the files no more than one is ever in memory.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oasst_worker.model.config import CheckpointError

__all__ = [
    "SAFETENSORS",
    "SMALL_FILES",
    "Cut",
    "Located",
    "StoredTensors",
    "find_shards",
    "resolve_checkpoint",
    "some",
]

SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"

# What a server needs of a hub repository; never code.
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]
_WEIGHT_FILES = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)

# A part of a tensor: a slice of each of its dimensions.
Cut = tuple[slice, ...]


def resolve_checkpoint(model: str, revision: str | None = None) -> Path:
    """Returns the local folder of `model`: a folder as it is, a hub id after fetching what is not yet cached.

    Raises:
        CheckpointError: There is no such folder, or the hub cannot give the repository.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model}: is a file; a checkpoint is a folder.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise CheckpointError(f"{model}: no such folder.")
    for weight_files in _WEIGHT_FILES:
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*SMALL_FILES, *weight_files]))
        # The hub's client raises its own errors, its HTTP library's and the system's; which ones changes by version.
        except Exception as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise CheckpointError(
                f"{model}: is no local folder and could not be fetched from the hub: {reason}."
            ) from error
        if any(folder.glob(weight_files[0])):
            break
    return folder


@dataclass(frozen=True, slots=True)
class Located:
    """Where a tensor is."""

    shard: Path
    shape: tuple[int, ...]


class StoredTensors:
    """The tensors of a folder's weight files."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: a file is missing, truncated or corrupt, or a tensor is stored twice.
        """
        self._open_shard: tuple[Path, _OpenShard] | None = None
        self.located: dict[str, Located] = {}  # By name.
        for shard in find_shards(folder):
            for name, stored in self._open(shard).items():
                if name in self.located:
                    raise CheckpointError(f"{shard}: holds {name}, which {self.located[name].shard.name} holds too.")
                self.located[name] = Located(shard, stored.shape)

    def read(self, cuts: Mapping[str, Cut]) -> Iterator[tuple[str, Tensor]]:
        """These parts of these tensors, in an order of its own. They may map a file: copy what is kept.

        Raises:
            CheckpointError: a file is not what it was, or does not hold a tensor's numbers.
        """
        by_shard: dict[Path, list[str]] = {}
        for name in cuts:
            by_shard.setdefault(self.located[name].shard, []).append(name)
        last = self._open_shard and self._open_shard[0]
        for shard in sorted(by_shard, key=lambda shard: shard != last):  # What is open first.
            for name in by_shard[shard]:
                with _unreadable_as_checkpoint_error(shard):
                    tensor = self._open(shard)[name].read(cuts[name])
                yield name, tensor

    def _open(self, shard: Path) -> "_OpenShard":
        if self._open_shard is None or self._open_shard[0] != shard:
            self._open_shard = None  # Closed before the next one takes memory.
            with _unreadable_as_checkpoint_error(shard):
                _read_ahead(shard)
            self._open_shard = (shard, _open_safetensors(shard) if shard.suffix == ".safetensors" else _open_bin(shard))
        return self._open_shard[1]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in an open file."""

    shape: tuple[int, ...]
    read: Callable[[Cut], Tensor]


_OpenShard = dict[str, _Stored]  # By name. The file is closed when nobody holds it.


def find_shards(folder: Path) -> list[Path]:
    """Returns the weight files of a checkpoint, safetensors before `.bin`, all of them existing."""
    for name in (SAFETENSORS, _BIN):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_shards(index)
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(f"{folder}: holds neither {SAFETENSORS} nor {_BIN}, whole or with an index.")


def _indexed_shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: is not a readable weight index.") from error
    # An index names its neighbours, nothing elsewhere on this machine.
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{index}: names {outside[0]!r}, which is no file name.")
    shards = sorted(index.parent / name for name in names)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{index}: names {some(missing)}, which the folder lacks.")
    return shards


def _read_ahead(shard: Path) -> None:
    """The system reads the file into its cache at the disk's speed; a mapped file it reads in far smaller pieces."""
    if hasattr(os, "posix_fadvise"):
        with shard.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _open_safetensors(shard: Path) -> _OpenShard:
    with _unreadable_as_checkpoint_error(shard):
        file: Any = safe_open(shard, framework="pt")  # Any: half of it has no types.
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # It is no mapping.
        return {name: _Stored(tuple(stored.get_shape()), stored.__getitem__) for name, stored in slices.items()}


def _open_bin(shard: Path) -> _OpenShard:
    with _unreadable_as_checkpoint_error(shard):
        # Only the zip format of torch >= 1.6 can be mapped.
        state: Any = torch.load(shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard))
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{shard}: holds something other than named tensors.")
    return {name: _Stored(tuple(tensor.shape), tensor.__getitem__) for name, tensor in state.items()}


@contextmanager
def _unreadable_as_checkpoint_error(shard: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise CheckpointError(f"{shard}: is truncated, corrupt or not made of plain tensors: {reason}.") from error


def some(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
