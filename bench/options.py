"""What the command line asks of a measurement, and what a measurement gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.checkpoints import DEMO, random_checkpoint

__all__ = ["Measured", "Options"]

# Rows to keep as JSON, and the tables that show them.
Measured = tuple[Sequence[Any], Sequence[Table]]


@dataclass(frozen=True)
class Options:
    """Each part reads some of them: see `bench.__main__.PARTS`."""

    folder: Path  # For checkpoints, which are made when they are first asked for.
    rounds: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 128
    prefix_tokens: int = 512
    concurrent: Sequence[int] = (1, 8, 32)
    waiting: Sequence[int] = (1_000, 100_000)
    training_steps: int = 12
    answers: Path | None = None

    def checkpoint(self, name: str) -> Path:
        """The demo, or random weights of a shape."""
        return DEMO if name == "demo" else random_checkpoint(name, self.folder)

    def checkpoints(self) -> Iterator[tuple[str, Path]]:
        """What most parts measure with."""
        for name in ("demo", "160m"):
            yield name, self.checkpoint(name)
