"""What stops a training run. Every message names what to change."""

__all__ = ["CheckpointError", "DataError", "DivergedError", "RecipeError", "TrainingError"]


class TrainingError(ValueError):
    """The run cannot be done as it was asked for."""


class RecipeError(TrainingError):
    """The recipe, or something that it names, cannot be used. The message says which key to change."""


class DataError(TrainingError):
    """A data file holds something else than it should. The message names file and line."""


class CheckpointError(TrainingError):
    """The run cannot go on from the checkpoint that is there."""


class DivergedError(TrainingError):
    """The loss is no number any more."""
