"""How far a run has come: a bar on a terminal, lines of text everywhere."""

import sys
import time

from tqdm import tqdm

from oasst_training.evaluation import Evaluation
from oasst_training.loss_curve import StepPoint

__all__ = ["Progress"]


class Progress:
    """Tells a person how a run gets on; says nothing unless `is_shown`."""

    def __init__(self, *, num_steps: int, first_step: int, is_shown: bool) -> None:
        self._num_steps = num_steps
        self._is_shown = is_shown
        self._last_step = first_step
        self._last_time_s = time.monotonic()
        has_bar = is_shown and sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, disable=not has_bar, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One more step is done."""
        self._bar.update()

    def tell_step(self, point: StepPoint, *, num_tokens: int) -> None:
        """`num_tokens` were trained on since the last call."""
        now_s = time.monotonic()
        step_s = (now_s - self._last_time_s) / max(1, point.step - self._last_step)
        tokens_per_s = num_tokens / max(1e-9, now_s - self._last_time_s)
        self._last_step, self._last_time_s = point.step, now_s
        self.say(
            f"step {point.step}/{self._num_steps}, epoch {point.epoch:.2f}, loss {point.loss:.4f},"
            f" rate {point.learning_rate:.2e}, {tokens_per_s:.0f} tokens/s,"
            f" {step_s * (self._num_steps - point.step):.0f} s left"
        )

    def tell_evaluation(self, dataset: str, evaluation: Evaluation) -> None:
        self.say(
            f"evaluation of {dataset}: loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.1%}"
            f" (without end tokens {evaluation.accuracy_without_ends:.1%}) of {evaluation.num_tokens} tokens"
        )

    def say(self, text: str) -> None:
        if self._is_shown:
            tqdm.write(text)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
