"""What a job puts into the engine: a sequence each, and whoever reads what the engine tells of it."""

from dataclasses import dataclass
from typing import Any, Protocol

from oasst_worker.engine import Sequence

__all__ = ["Part", "PartError", "PartOutput"]


@dataclass(frozen=True, slots=True)
class PartError:
    """Why a part cannot go on."""

    reason: str  # ErrorInfo.reason.
    message: str


class PartOutput(Protocol):
    """What one step gave one part."""

    @property
    def part(self) -> "Part": ...

    @property
    def error(self) -> PartError | None: ...

    @property
    def has_ended(self) -> bool:
        """The part is done, for good or by its error."""


class Part(Protocol):
    """Belongs to the engine's thread once it was handed to the loop; compared by identity."""

    @property
    def sequence(self) -> Sequence: ...

    def take(self, output: Any) -> PartOutput:  # Any: the engine's kind of output for this kind of sequence.
        """The output as its job is to see it."""

    def fail(self, error: PartError) -> PartOutput:
        """The output of a part that ends here."""
