"""What keeps a model from being evaluated."""

__all__ = ["HarnessError", "TaskError"]


class HarnessError(Exception):
    """The harness cannot do its work; says what to do."""


class TaskError(ValueError):
    """A task asks for what the service does not have, or does not allow."""
