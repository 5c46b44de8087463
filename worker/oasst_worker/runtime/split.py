"""Whether a model is split over several devices, and how: decided before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.ranks import Share

__all__ = ["Machine", "Split", "UnsupportedSplitError", "choose_split"]


class UnsupportedSplitError(ValueError):
    """The model cannot be split as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a model is computed, and why so."""

    kind: Literal["none", "tensor", "layers"]
    num_ranks: int
    reason: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What a choice of a split looks at."""

    gpu_bytes: Sequence[int]  # Memory of each GPU; none on a CPU.
    model_bytes: int  # Of the weights, in the dtype they are served in.
    cache_bytes: int  # That a KV cache needs beside the weights to be of use.
    has_placement: bool = False  # Memory of devices, or where to offload, was asked for.

    @property
    def num_gpus(self) -> int:
        return len(self.gpu_bytes)


def choose_split(config: NeoXConfig, kind: str, num_ranks: int | None, machine: Machine) -> Split:
    """The split of a model on a machine. `kind` is auto, none, tensor or layers.

    auto takes `tensor` where it was told a number of ranks; `layers` where memory or offloading was asked for; and
    `none` where one GPU holds the model and a KV cache of use: there alone steps that decode are replayed, and launched
    ahead. Over several smaller GPUs it takes `tensor`, by as many as divide the model, unless there are none or a share
    is too big for one of them.

    Raises:
        UnsupportedSplitError: if the model, the machine and the options do not fit.
    """
    if kind in ("none", "layers") or (kind == "auto" and num_ranks == 1):
        if num_ranks not in (None, 1):
            raise UnsupportedSplitError(f"--split {kind} is one process, but --num-ranks is {num_ranks}; leave one out")
        return Split("layers" if kind == "layers" else "none", 1, "as asked")
    if num_ranks is not None:
        _check(config, num_ranks, machine.num_gpus)
        return Split("tensor", num_ranks, "as asked")
    if kind == "tensor":
        if machine.num_gpus < 2:
            raise UnsupportedSplitError(
                f"--split tensor needs several GPUs, and there are {machine.num_gpus}; on a CPU give --num-ranks"
            )
        _check(config, machine.num_gpus, machine.num_gpus)
        return Split("tensor", machine.num_gpus, "one rank for each GPU")
    return _choose(config, machine)


def _choose(config: NeoXConfig, machine: Machine) -> Split:
    num_gpus = machine.num_gpus
    if machine.has_placement:
        return Split("layers", 1, "--device-memory or --offload is given")
    if num_gpus < 2:
        return Split("none", 1, "there are not several GPUs")
    if machine.model_bytes + machine.cache_bytes <= machine.gpu_bytes[0]:
        return Split("none", 1, f"one GPU holds the model and its cache; --split tensor takes all {num_gpus}")
    most = max(count for count in range(1, num_gpus + 1) if _divides(config, count))
    if most == 1:
        return Split("layers", 1, f"no number of ranks up to {num_gpus} divides the model")
    if machine.model_bytes / most > min(machine.gpu_bytes[:most]):
        return Split("layers", 1, f"a share of {most} ranks is too big for the smallest GPU")
    return Split("tensor", most, f"{most} of {num_gpus} GPUs divide the model")


def _check(config: NeoXConfig, num_ranks: int, num_gpus: int) -> None:
    if num_gpus and num_ranks > num_gpus:
        raise UnsupportedSplitError(f"--num-ranks {num_ranks} needs as many GPUs, and there are {num_gpus}")
    try:
        Share(0, num_ranks).of_config(config)
    except ValueError as error:
        raise UnsupportedSplitError(str(error)) from error


def _divides(config: NeoXConfig, num_ranks: int) -> bool:
    return not (config.num_heads % num_ranks or config.intermediate_size % num_ranks)
