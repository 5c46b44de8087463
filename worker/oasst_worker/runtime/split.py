"""Whether a model is split over several processes, and over how many: decided before anything is loaded."""

from dataclasses import dataclass
from typing import Literal

from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.ranks import Share

__all__ = ["Split", "UnsupportedSplitError", "choose_split"]


class UnsupportedSplitError(ValueError):
    """The model cannot be split as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a model is computed, and why so."""

    kind: Literal["none", "tensor"]
    num_ranks: int
    reason: str


def choose_split(config: NeoXConfig, kind: str, num_ranks: int | None, *, num_gpus: int) -> Split:
    """The split of a model on a machine with `num_gpus` GPUs to use, 0 on a CPU. `kind` is auto, none or tensor.

    auto splits where it was told a number of ranks or has several GPUs, over as many of them as divide the model.

    Raises:
        UnsupportedSplitError: if the model, the machine and the options do not fit.
    """
    if kind == "none" or (kind == "auto" and num_ranks == 1):
        if num_ranks not in (None, 1):
            raise UnsupportedSplitError(f"--split none is one process, but --num-ranks is {num_ranks}; leave one out")
        return Split("none", 1, "as asked")
    if num_ranks is not None:
        _check(config, num_ranks, num_gpus)
        return Split("tensor", num_ranks, "as asked")
    if kind == "tensor":
        if num_gpus < 2:
            raise UnsupportedSplitError(
                f"--split tensor needs several GPUs, and there are {num_gpus}; on a CPU give --num-ranks"
            )
        _check(config, num_gpus, num_gpus)
        return Split("tensor", num_gpus, "one rank for each GPU")
    if num_gpus < 2:
        return Split("none", 1, "there are not several GPUs")
    most = max(count for count in range(1, num_gpus + 1) if _divides(config, count))
    if most == 1:
        return Split("none", 1, f"no number of ranks up to {num_gpus} divides the model")
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
