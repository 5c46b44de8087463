"""The processes of a model that is split over several: they live and die together.

The first rank is the worker itself. It starts the others, and tells each through its standard input what to compute
next; tensors then go between the ranks themselves (`model.ranks`). A rank whose input ends, ends: none outlives the
worker. A rank that ends first is noticed by a thread that waits for it.
"""

import array
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import AttentionSpan, StepInputs, StepRows
from oasst_worker.model.neox import KVCache, NeoX
from oasst_worker.model.ranks import ConnectedRanks

__all__ = ["Command", "LostRankError", "RankProcesses", "SplitModel", "pack_rows", "read_command", "unpack_rows"]

_T = TypeVar("_T")

_ENDING_S = 5.0
_NOTICED_S = 1.0  # From a process's end until its thread has seen it.
# A folder of ours is made there, if it exists: files that ranks share are no disk's business.
_IN_MEMORY = "/dev/shm"  # noqa: S108
_HEADER = 2  # Words: the command, and how many words follow. A word is an int64.


class Command(IntEnum):
    """What the first rank tells the others to call, as it calls it itself."""

    MAKE_CACHE = 1  # number of blocks
    FORWARD = 2  # packed rows
    HIDDEN = 3  # packed rows
    LOGITS = 4  # number of rows, which then come from the first rank


class LostRankError(RuntimeError):
    """A process that computes a part of the model has ended."""


class RankProcesses:
    """The ranks other than the first, as processes of `python -m oasst_worker.runtime.follow`.

    `lost` fails with LostRankError when one of them has ended before `close`.
    """

    def __init__(self, num_ranks: int, orders: Mapping[str, Any]) -> None:  # Any: JSON.
        """Each is told its rank and `orders`."""
        self.lost: Future[None] = Future()
        self._is_closing = False
        in_memory = os.access(_IN_MEMORY, os.W_OK)
        self._meeting_folder = tempfile.TemporaryDirectory(prefix="oasst-ranks-", dir=_IN_MEMORY if in_memory else None)
        self.meeting_file = Path(self._meeting_folder.name) / "meeting"
        shared = {**orders, "num_ranks": num_ranks, "meeting_file": str(self.meeting_file)}
        command = [sys.executable, "-m", "oasst_worker.runtime.follow"]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, num_ranks):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes[rank] = process
            self._write(rank, json.dumps({**shared, "rank": rank}).encode() + b"\n")
            threading.Thread(target=self._watch, args=(rank,), name=f"rank-{rank}", daemon=True).start()

    def wait_until_ready(self) -> list[str]:
        """Every rank is ready for what comes next: to meet the others, then to be told what to compute.

        Returns what each answered, in the order of ranks.

        Raises:
            LostRankError: if one ended instead.
        """
        answers: list[str] = []
        for rank, process in self._processes.items():
            answers.append(_pipe(process.stdout).readline().decode())
            if not answers[-1]:
                raise LostRankError(f"rank {rank} of the model ended while it loaded; its own message is above")
        return answers

    def while_they_live(self, work: Callable[[], _T]) -> _T:
        """What `work` returns, which waits for all ranks inside a library that is not told when one ends.

        Raises:
            LostRankError: if one has ended meanwhile. The work is left behind, in a thread of its own.
        """
        done: Future[_T] = Future()
        threading.Thread(target=_complete, args=(done, work), name="meet-ranks", daemon=True).start()
        either: list[Future[Any]] = [done, self.lost]
        wait(either, return_when=FIRST_COMPLETED)
        if not done.done():
            self.lost.result()
        if done.exception():  # Of a rank that ended, a library may hear before we do.
            with suppress(TimeoutError):
                self.lost.result(_NOTICED_S)
        return done.result()

    def tell(self, command: Command, words: Sequence[int]) -> None:
        """
        Raises:
            LostRankError: if a rank does not listen any more.
        """
        message = array.array("q", [command, len(words), *words]).tobytes()
        for rank in self._processes:
            self._write(rank, message)

    def kill(self) -> None:
        """No rank goes on. Whoever tells one that does not listen fails, instead of waiting for ever."""
        self._is_closing = True
        for process in self._processes.values():
            process.kill()

    def close(self) -> None:
        """No rank is left. Nobody may be in the middle of telling them: else `kill` first."""
        self._is_closing = True
        for process in self._processes.values():
            with suppress(OSError):  # What was written last found nobody.
                _pipe(process.stdin).close()
        deadline_s = time.monotonic() + _ENDING_S
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):  # It may be waiting for a rank that is gone.
                process.wait(max(0.0, deadline_s - time.monotonic()))
        self.kill()
        for process in self._processes.values():
            process.wait()
            _pipe(process.stdout).close()
        self._meeting_folder.cleanup()

    def _write(self, rank: int, message: bytes) -> None:
        pipe = _pipe(self._processes[rank].stdin)
        try:
            pipe.write(message)
            pipe.flush()
        except (OSError, ValueError) as error:
            raise LostRankError(f"rank {rank} of the model does not listen any more") from error

    def _watch(self, rank: int) -> None:
        exit_code = self._processes[rank].wait()
        if not self._is_closing:
            with suppress(InvalidStateError):  # Another was lost before, or nobody asks any more.
                self.lost.set_exception(LostRankError(f"rank {rank} of the model ended with exit code {exit_code}"))


class SplitModel:
    """The first rank's share of a model, with the others following: used like a NeoX, by one thread."""

    def __init__(self, model: NeoX, processes: RankProcesses, ranks: ConnectedRanks) -> None:
        self.processes = processes
        self.traffic = ranks.traffic
        self._model = model

    @property
    def config(self) -> NeoXConfig:
        return self._model.config

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def is_position_exact(self) -> bool:
        return self._model.is_position_exact

    @property
    def is_row_exact(self) -> bool:
        return self._model.is_row_exact

    def make_cache(self, num_blocks: int) -> KVCache:
        self.processes.tell(Command.MAKE_CACHE, [num_blocks])
        return self._model.make_cache(num_blocks)

    def forward(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        self.processes.tell(Command.FORWARD, pack_rows(_known_rows(inputs)))
        with _without_retry():
            return self._model.forward(inputs, cache)

    def hidden(self, inputs: StepInputs, cache: KVCache) -> Tensor:
        self.processes.tell(Command.HIDDEN, pack_rows(_known_rows(inputs)))
        with _without_retry():
            return self._model.hidden(inputs, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        self.processes.tell(Command.LOGITS, [len(hidden)])
        with _without_retry():
            return self._model.logits(self._model.ranks.from_first(hidden))


@contextmanager
def _without_retry() -> Iterator[None]:
    """An out-of-memory error ends the worker: the other ranks are in the middle of the step that would be repeated."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LostRankError(f"rank 0 of the model has no memory for the step: {error}") from error


def read_command(pipe: IO[bytes]) -> tuple[Command, list[int]] | None:
    """The next command and its words; None at the end."""
    header = array.array("q")
    header.frombytes(pipe.read(_HEADER * header.itemsize))
    if len(header) < _HEADER:
        return None
    words = array.array("q")
    words.frombytes(pipe.read(header[1] * words.itemsize))
    return Command(header[0]), words.tolist()


def pack_rows(rows: StepRows) -> list[int]:
    """rows, spans, drawing rows | ids | positions | cells | drawing rows | each span's five numbers and blocks."""
    words = [len(rows.token_ids), len(rows.spans), len(rows.drawing_rows)]
    for numbers in (rows.token_ids, rows.positions, rows.cells, rows.drawing_rows):
        words += numbers
    for span in rows.spans:
        words += [span.first_row, span.num_rows, span.start, span.num_prompt_rows, len(span.blocks), *span.blocks]
    return words


def unpack_rows(words: Sequence[int]) -> StepRows:
    """What was packed."""
    num_rows, num_spans, num_drawing = words[:3]
    at = 3

    def take(count: int) -> Sequence[int]:
        nonlocal at
        at += count
        return words[at - count : at]

    token_ids, positions, cells, drawing_rows = map(take, (num_rows, num_rows, num_rows, num_drawing))
    spans = []
    for _ in range(num_spans):
        first_row, count, start, num_prompt_rows, num_blocks = take(5)
        spans.append(AttentionSpan(first_row, count, start, num_prompt_rows, take(num_blocks)))
    return StepRows(token_ids, positions, cells, spans, drawing_rows)


def _complete(done: "Future[_T]", work: Callable[[], _T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)


def _known_rows(inputs: StepInputs) -> StepRows:
    if inputs.rows is None:
        raise ValueError("the other ranks of a model cannot be told tokens that the host does not know")
    return inputs.rows


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the process was started without this pipe")
    return pipe
