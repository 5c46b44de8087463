"""What a step costs, learnt from the steps that were taken, and how much of one prompts may have."""

__all__ = ["StepCost"]

# A row beside others costs about this share of what a step costs without any: on a CPU, before anything is learnt.
_PRIOR_ROW_COST = 0.1
_SMALLEST_ROW_COST = 1 / 4096
_LARGEST_ROW_COST = 1.0

# Larger steps tell little of a further row in a small one.
_LONGEST_STEP = 128

# What a step tells counts half after some seventy others. At first the prior counts like so many steps of these rows.
_FORGETTING = 0.99
_PRIOR_WEIGHT = 1.0
_PRIOR_STEPS = (1, 32)
# Rows squared: less spread than this tells nothing of a row's cost.
_LEAST_VARIANCE = 4.0
# A step that takes so many times what it should was held up by something else.
_HELD_UP = 3.0


class StepCost:
    """Seconds of a step = fixed + rows * each: the least squares over recent steps.

    What the fixed part is (reading the weights, calls) and what a row adds differ between devices and models by orders
    of magnitude. Only their ratio is used.
    """

    def __init__(self) -> None:
        self.row_cost = _PRIOR_ROW_COST  # What a row adds, in units of the fixed part.
        self._fixed_s = 0.0
        # Sums over steps, weighted: 1, rows, seconds, rows * rows, rows * seconds.
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def record(self, num_rows: float, seconds: float) -> None:
        """A step of so many rows took so long."""
        if num_rows > _LONGEST_STEP:
            return
        if not self._weight:
            fixed_s = seconds / (1 + num_rows * self.row_cost)
            for rows in _PRIOR_STEPS:
                self._add(rows, fixed_s * (1 + rows * self.row_cost), _PRIOR_WEIGHT)
            self._fixed_s = fixed_s
        self._forget()
        self._add(num_rows, min(seconds, _HELD_UP * self._fixed_s * (1 + num_rows * self.row_cost)), 1.0)
        self._fit()

    def rows_within(self, slowdown: float, *, beside: float) -> float:
        """How many rows a step of `beside` rows may get, to take `slowdown` times as long as without."""
        return (slowdown - 1) * (1 / self.row_cost + beside)

    def _add(self, rows: float, seconds: float, weight: float) -> None:
        self._weight += weight
        self._rows += weight * rows
        self._seconds += weight * seconds
        self._rows_rows += weight * rows * rows
        self._rows_seconds += weight * rows * seconds

    def _forget(self) -> None:
        self._weight *= _FORGETTING
        self._rows *= _FORGETTING
        self._seconds *= _FORGETTING
        self._rows_rows *= _FORGETTING
        self._rows_seconds *= _FORGETTING

    def _fit(self) -> None:
        spread = self._weight * self._rows_rows - self._rows**2
        if spread < _LEAST_VARIANCE * self._weight**2:
            return
        each_s = (self._weight * self._rows_seconds - self._rows * self._seconds) / spread
        fixed_s = (self._seconds - each_s * self._rows) / self._weight
        if each_s > 0 and fixed_s > 0:
            self._fixed_s = fixed_s
            self.row_cost = min(max(each_s / fixed_s, _SMALLEST_ROW_COST), _LARGEST_ROW_COST)
