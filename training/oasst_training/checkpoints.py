"""The checkpoints of a run, from which it can go on after a kill.

    output_dir/checkpoint-00000200/
        run.json    the step, and what a run must have in common with this one to go on from here
        state/      weights in full precision, optimizer and loss scale, as accelerate writes them
        model/      the model as it is served

A checkpoint appears under its name only when it is complete.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasst_training.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointFolder"]

_PREFIX = "checkpoint-"
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint, made after `step` steps."""

    path: Path
    step: int

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def model(self) -> Path:
        return self.path / "model"


class CheckpointFolder:
    """The checkpoints in one folder. `identity` is what decides on the weights, by name."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._folder = folder
        self._identity = identity

    def latest(self) -> Checkpoint | None:
        """The last checkpoint, if there is any.

        Raises:
            CheckpointError: if the run that made it had another identity.
        """
        steps = self._steps()
        if not steps:
            return None
        checkpoint = self._checkpoint(steps[-1])
        self._check_identity(checkpoint)
        return checkpoint

    def clean(self) -> None:
        """What a killed run had not completed is gone."""
        for path in self._folder.glob(f"{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(path)

    def partial(self, step: int) -> Checkpoint:
        """Where to write the checkpoint of this step. It counts once it is completed."""
        return Checkpoint(self._folder / f"{self._name(step)}{_PARTIAL}", step)

    def complete(self, checkpoint: Checkpoint, *, keep: int | None) -> None:
        """The checkpoint counts from now on. Of the others only the newest stay, `keep` in all; None keeps all."""
        run = {"step": checkpoint.step, "identity": self._identity}
        (checkpoint.path / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        checkpoint.path.replace(self._folder / self._name(checkpoint.step))
        for step in self._steps()[: -keep if keep else 0]:
            shutil.rmtree(self._folder / self._name(step))

    def _check_identity(self, checkpoint: Checkpoint) -> None:
        identity = json.loads((checkpoint.path / "run.json").read_text(encoding="utf-8"))["identity"]
        for name in identity | self._identity:
            then, now = identity.get(name), self._identity.get(name)
            if then != now:
                raise CheckpointError(
                    f"{checkpoint.path} was made with {name} {then}, now it is {now}:"
                    " go on with the same recipe and data, or choose another output_dir"
                )

    def _checkpoint(self, step: int) -> Checkpoint:
        return Checkpoint(self._folder / self._name(step), step)

    def _steps(self) -> list[int]:
        numbers = (path.name.removeprefix(_PREFIX) for path in self._folder.glob(f"{_PREFIX}*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    @staticmethod
    def _name(step: int) -> str:
        return f"{_PREFIX}{step:08}"
