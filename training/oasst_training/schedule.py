"""The learning rate over the steps: DeepSpeed's `WarmupDecayLR`, with which the original was trained."""

import math

__all__ = ["learning_rate_factor"]


def learning_rate_factor(step: int, *, num_warmup_steps: int, num_steps: int) -> float:
    """What the learning rate is multiplied by in this step, counted from 0.

    It rises with the logarithm of the step, from 0 to 1, then falls in a line to 0 at `num_steps`.
    """
    num_warmup_steps = max(2, num_warmup_steps)  # As in DeepSpeed: the logarithm of 1 divides by nothing.
    if step < num_warmup_steps:
        return math.log(step + 1) / math.log(num_warmup_steps)
    return max(0.0, (num_steps - step) / max(1, num_steps - num_warmup_steps))
