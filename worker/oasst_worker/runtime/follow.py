"""A rank that is not the first, as a process: computes what it is told until nobody tells it any more."""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

import torch

from oasst_worker.model.config import CheckpointError
from oasst_worker.model.neox import KVCache, NeoX
from oasst_worker.model.ranks import ExchangeError, Share
from oasst_worker.runtime.build import RuntimeOptions, open_share
from oasst_worker.runtime.memory import usable_bytes
from oasst_worker.runtime.ranks import Command, read_command, unpack_rows

__all__ = ["follow", "main"]

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Follows what stdin tells and answers on stdout. Whatever else is printed goes to stderr: NCCL's log, say."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return follow(sys.stdin.buffer, answers)


def follow(orders: IO[bytes], answers: IO[bytes]) -> int:
    """Serves until `orders` ends; the process's exit code."""
    _end_with_parent()
    told = json.loads(orders.readline())
    try:
        model = _load(told, answers)
    except (CheckpointError, ExchangeError, torch.OutOfMemoryError) as error:
        sys.stderr.write(f"oasst_worker, rank {told['rank']}: {error}\n")
        return 2
    cache: KVCache | None = None
    while (command := read_command(orders)) is not None:
        match command:
            case Command.MAKE_CACHE, [num_blocks]:
                cache = model.make_cache(num_blocks)
            case Command.LOGITS, [num_rows]:
                rows = model.ranks.from_first(model.make_rows(num_rows))
                model.logits(rows)
            case kind, words if cache is not None:
                compute = model.forward if kind is Command.FORWARD else model.hidden
                compute(unpack_rows(words).to(model.device), cache)
            case kind, _:
                raise RuntimeError(f"told to {kind.name} before there was a cache")
    return 0


def _load(told: dict[str, Any], answers: IO[bytes]) -> NeoX:  # Any: JSON.
    """The rank's share computes; the first rank is told when it can be met, then how much memory is left."""
    share = Share(told["rank"], told["num_ranks"])
    opened = open_share(Path(told["folder"]), RuntimeOptions(**told["options"]), share)
    _answer(answers, "ready to meet")
    model = opened.load(opened.connect(Path(told["meeting_file"])))
    _answer(answers, str(usable_bytes(model.device)))
    return model


def _answer(answers: IO[bytes], text: str) -> None:
    answers.write(f"{text}\n".encode())
    answers.flush()


def _end_with_parent() -> None:
    """Signals to the whole group are the first rank's to heed; where the system can, its death is ours at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # It died before that call.
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
