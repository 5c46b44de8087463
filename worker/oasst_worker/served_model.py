"""What a worker serves. Knows no PyTorch: a model may be anything that an engine can be made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oasst_worker.engine import Engine
from oasst_worker.intake import Intake

if TYPE_CHECKING:
    from oasst_worker.runtime.ranks import RankProcesses

__all__ = ["ServedModel"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in memory, by its name."""

    name: str
    engine: Engine
    intake: Intake
    ranks: "RankProcesses | None" = None  # The other processes of a split model.
