"""One model in several processes: which part of every matrix is a rank's, and how ranks exchange what they computed.

Heads, the MLP's inner dimension and the vocabulary are cut into as many runs as there are ranks; norms are everybody's.
A rank's products give a part of every row's sum, so a block of layers ends in one sum over all ranks.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.shared_memory import SharedMemory

__all__ = ["ALONE", "Alone", "ConnectedRanks", "ExchangeError", "Ranks", "Share", "TrafficCount", "connect_ranks"]

# Longer than any step may take; once ranks have met, one that dies is noticed by its connections.
_TIMEOUT = timedelta(minutes=10)

# Numbers that are exchanged to see that they arrive: small ones, whose sums are exact in 16 bits too.
_NUM_PROBED = 4096


class ExchangeError(RuntimeError):
    """What ranks give each other does not arrive as it was given; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the model that is one rank's: the `rank`-th of `num_ranks`."""

    rank: int = 0
    num_ranks: int = 1

    @property
    def is_first(self) -> bool:
        """Biases and residuals, which count once, are this rank's to add."""
        return self.rank == 0

    def of(self, size: int) -> slice:
        """This rank's run of `size` things, all runs equally long but for the last."""
        length = -(-size // self.num_ranks)
        return slice(min(self.rank * length, size), min((self.rank + 1) * length, size))

    def of_config(self, config: NeoXConfig) -> NeoXConfig:
        """The sizes of this rank's heads and MLP; hidden size and vocabulary are the whole model's.

        Raises:
            ValueError: if the heads or the MLP cannot be cut into that many equal parts.
        """
        for name, size in (("attention heads", config.num_heads), ("MLP dimensions", config.intermediate_size)):
            if size % self.num_ranks:
                raise ValueError(
                    f"--num-ranks {self.num_ranks} does not divide the model's {size} {name}; use a number that does"
                )
        return replace(
            config,
            num_heads=config.num_heads // self.num_ranks,
            intermediate_size=config.intermediate_size // self.num_ranks,
        )


@dataclass(slots=True)
class TrafficCount:
    """What a rank exchanged so far."""

    num_exchanges: int = 0
    num_bytes: int = 0  # Of the tensors it gave.

    def add(self, tensor: Tensor, times: int = 1) -> None:
        self.num_exchanges += times
        self.num_bytes += times * tensor.nbytes


class Ranks(Protocol):
    """The exchanges of a rank with the others. All ranks make the same calls in the same order."""

    @property
    def share(self) -> Share: ...

    @property
    def traffic(self) -> TrafficCount: ...

    @property
    def memory(self) -> SharedMemory | None:
        """By which kernels can exchange rows themselves."""
        ...

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, at every rank."""
        ...

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        """[rows, part of the columns] -> [rows, num_columns] at the first rank; the others keep what they had."""
        ...

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor; the others give one of its shape and dtype."""
        ...


class Alone:
    """A model in one process: nothing to exchange."""

    share = Share()
    memory: SharedMemory | None = None

    def __init__(self) -> None:
        self.traffic = TrafficCount()

    def sum(self, part: Tensor) -> Tensor:
        return part

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        return part

    def from_first(self, tensor: Tensor) -> Tensor:
        return tensor


ALONE = Alone()


class ConnectedRanks:
    """Ranks connected by NCCL on GPUs; on CPUs by gloo, and by shared memory where they have some.

    A row's bits must not depend on the rows beside it. gloo's all-reduce adds in an order that depends on where in the
    tensor a number stands, so on a CPU parts are exchanged as they are and added in the order of ranks.
    """

    def __init__(self, share: Share, group: Any) -> None:  # Any: PyTorch's stubs lack the methods of its backends.
        self.share = share
        self.traffic = TrafficCount()
        self._group = group
        self.memory: SharedMemory | None = None

    def share_memory(self, file: Path, dtype: torch.dtype) -> None:
        """Rows of `dtype` go through memory that is mapped from this file, if every rank can do that."""
        memory: SharedMemory | None = None
        with suppress(RuntimeError, OSError):
            memory = SharedMemory(file, self.share.rank, self.share.num_ranks, dtype)
        if self.sum(torch.ones(1) if memory else torch.zeros(1)) == self.share.num_ranks:
            self.memory = memory
        if self.share.is_first:  # All have it by now: nothing of it outlives them.
            file.unlink(missing_ok=True)

    def check(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Every kind of exchange gives what it should.

        Raises:
            ExchangeError: if one does not.
        """
        rank, num_ranks = self.share.rank, self.share.num_ranks
        known = (torch.arange(_NUM_PROBED, device=device) % 16).to(dtype)
        total = self.sum(known + rank)
        gathered = self.gather_columns((known + rank)[None], num_ranks * _NUM_PROBED)
        first = self.from_first(known + rank)
        whole = torch.cat([known + each for each in range(num_ranks)])[None]
        expected = (num_ranks * known + sum(range(num_ranks)), whole if self.share.is_first else gathered, known)
        if not all(torch.equal(ours, right) for ours, right in zip((total, gathered, first), expected, strict=True)):
            raise ExchangeError(
                f"rank {rank} of the model did not get what the other ranks gave: use --split none or layers, or, where"
                " GPUs cannot read each other's memory, set NCCL_P2P_DISABLE=1 in the environment"
            )

    def sum(self, part: Tensor) -> Tensor:
        self.traffic.add(part)
        if part.device.type != "cpu":
            self._group.allreduce([part]).wait()
            return part
        part = part.contiguous()
        if self.memory and part.dtype is self.memory.dtype:
            return self.memory.sum_(part)
        parts = part.new_empty(self.share.num_ranks, *part.shape)
        self._group.allgather([list(parts.unbind())], [part]).wait()
        total = parts[0]
        for other in parts[1:]:
            total += other
        return total

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        width = -(-num_columns // self.share.num_ranks)
        part = F.pad(part, (0, width - part.shape[1])).contiguous()
        self.traffic.add(part)
        if self.memory and part.dtype is self.memory.dtype:
            return self.memory.gather_columns(part, num_columns)
        parts = part.new_empty(self.share.num_ranks, *part.shape) if self.share.is_first else None
        options = dist.GatherOptions()
        options.rootRank = 0
        self._group.gather([] if parts is None else [list(parts.unbind())], [part], options).wait()
        return part if parts is None else parts.transpose(0, 1).flatten(1)[:, :num_columns]

    def from_first(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self.traffic.add(tensor)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()
        return tensor


def connect_ranks(share: Share, device: torch.device, dtype: torch.dtype, meeting_file: Path) -> ConnectedRanks:
    """All ranks of a model in `dtype` have met by `meeting_file`, which they share and which was not there before.

    Raises:
        ExchangeError: if they do not understand each other.
    """
    store = dist.FileStore(str(meeting_file), share.num_ranks)  # type: ignore[attr-defined]
    group: Any  # As above.
    if device.type == "cuda":
        group = dist.ProcessGroupNCCL(store, share.rank, share.num_ranks, dist.ProcessGroupNCCL.Options())
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # Not in the stubs.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = _TIMEOUT
        group = dist.ProcessGroupGloo(store, share.rank, share.num_ranks, options)
    ranks = ConnectedRanks(share, group)
    if device.type == "cpu":
        ranks.share_memory(meeting_file.with_suffix(".memory"), dtype)
    ranks.check(device, dtype)
    return ranks
