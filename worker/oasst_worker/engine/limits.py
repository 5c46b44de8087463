"""How large a step may be, which the device's memory may lower for a while."""

from oasst_worker.engine.batch import Batch

__all__ = ["StepBudgetError", "StepLimits", "check_budget"]

_GROWS_AFTER_STEPS = 64


class StepBudgetError(ValueError):
    """A step is too small for what it has to hold; the message says what to change."""


def check_budget(*, max_sequences: int, step_tokens: int, prefill_tile: int) -> None:
    """A step can hold a token of every sequence beside one tile of a prompt.

    Raises:
        StepBudgetError: if it cannot.
    """
    if max_sequences < 1:
        raise StepBudgetError(f"max_sequences must be at least 1, not {max_sequences}")
    if step_tokens < max_sequences + prefill_tile:
        raise StepBudgetError(
            f"step_tokens must be at least max_sequences + {prefill_tile} = {max_sequences + prefill_tile},"
            f" not {step_tokens}"
        )


class StepLimits:
    """Sequences and tokens of a step: as configured, halved whenever the device had no memory, doubled after steps
    for which it had.

        configured -> halved -> halved ... -> one sequence, one tile of a prompt -> nothing left to halve
                  <- doubled <- doubled <-
    """

    def __init__(self, *, max_sequences: int, step_tokens: int, prefill_tile: int) -> None:
        self.max_sequences = max_sequences
        self.step_tokens = step_tokens
        self._configured = (max_sequences, step_tokens)
        self._prefill_tile = prefill_tile
        self._num_good_steps = 0

    def shrink(self, failed: Batch) -> bool:
        """A step holds half of what this batch did; False if the batch could not be smaller."""
        num_sequences, num_tokens = len(failed.chunks), failed.num_tokens
        if num_sequences == 1 and num_tokens <= self._prefill_tile:
            return False
        self.max_sequences = max(1, num_sequences // 2)
        # Never less than a tile, or no prompt would get on.
        self.step_tokens = max(self.max_sequences, self._prefill_tile, num_tokens // 2)
        self._num_good_steps = 0
        return True

    def record_good_step(self) -> None:
        """The device had memory for a step within the limits."""
        if (self.max_sequences, self.step_tokens) == self._configured:
            return
        self._num_good_steps += 1
        if self._num_good_steps == _GROWS_AFTER_STEPS:
            self._num_good_steps = 0
            max_sequences, step_tokens = self._configured
            self.max_sequences = min(2 * self.max_sequences, max_sequences)
            self.step_tokens = min(2 * self.step_tokens, step_tokens)
