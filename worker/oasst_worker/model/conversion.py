"""Keeps a checkpoint of `.bin` files as safetensors, converted once: those are mapped, not unpickled, and each rank of
several reads only its own part of them.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from oasst_worker.model.config import CheckpointError
from oasst_worker.model.shards import SAFETENSORS, SMALL_FILES, StoredTensors, find_shards
from oasst_worker.model.weights import IGNORED

__all__ = ["convert_bin"]

_logger = logging.getLogger(__name__)


def convert_bin(folder: Path, cache: Path) -> Path:
    """Returns a folder with the checkpoint as safetensors: `folder` if it is one, otherwise one in `cache`.

    What was converted before is found by the files' names, sizes and times. Of several processes that convert at once,
    one wins and all get the same. Memory holds one file at a time.

    Raises:
        CheckpointError: a file is missing or corrupt, or `cache` cannot be written.
    """
    shards = find_shards(folder)
    if shards[0].suffix == ".safetensors":
        return folder
    converted = cache / f"{folder.resolve().name}-{_fingerprint(shards)}"
    if converted.is_dir():
        _logger.info("read as safetensors, converted before folder=%s", converted)
        return converted
    _logger.info("converting %d .bin files folder=%s", len(shards), converted)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=cache) as work:
            unfinished = Path(work) / "checkpoint"
            _convert(folder, shards, unfinished)
            _move(unfinished, converted)
    except OSError as error:
        raise CheckpointError(f"{cache}: cannot keep a converted checkpoint: {error.strerror or error}.") from error
    return converted


def _fingerprint(shards: list[Path]) -> str:
    files = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _convert(folder: Path, shards: list[Path], target: Path) -> None:
    target.mkdir()
    stored = StoredTensors(folder)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = dict(_tensors_of(stored, shard))
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        _logger.info("converted %s (%d of %d)", shard.name, number, len(shards))
    (target / f"{SAFETENSORS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in SMALL_FILES:
        if (folder / file).is_file():
            shutil.copyfile(folder / file, target / file)


def _tensors_of(stored: StoredTensors, shard: Path) -> Iterator[tuple[str, Tensor]]:
    """What is worth keeping of a file. safetensors holds each tensor apart and whole."""
    whole = {
        name: tuple(slice(0, size) for size in located.shape)
        for name, located in stored.located.items()
        if located.shard == shard and not IGNORED.search(name)
    }
    storages: set[int] = set()
    for name, tensor in stored.read(whole):
        storage = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if storage in storages else tensor.contiguous()
        storages.add(storage)


def _move(unfinished: Path, converted: Path) -> None:
    """All of it is there, or nothing."""
    try:
        os.rename(unfinished, converted)
    except OSError:
        if not converted.is_dir():  # Otherwise another process was faster.
            raise
