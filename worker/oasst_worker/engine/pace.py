"""What a step costs, learnt from the steps that were taken, and how much of one prompts may have."""

__all__ = ["StepCost"]

# A row beside others costs about this share of what a step costs without any: on a CPU, before anything is learnt.
_PRIOR_ROW_COST = 0.1
_SMALLEST_ROW_COST = 1 / 4096
_LARGEST_ROW_COST = 1.0

# Larger steps tell little of a further row in a small one.
_LONGEST_STEP = 128

# What a step without prompts tells of a row's cost counts half after some seventy others, and how long such a step
# takes, on a machine that does other things as well, after three. At first the prior counts like so many steps of
# these rows.
_FORGETTING = 0.99
_FORGETTING_FIXED = 0.8
_PRIOR_WEIGHT = 1.0
_PRIOR_STEPS = (1, 32)
# Rows squared: less spread than this tells nothing of a row's cost.
_LEAST_VARIANCE = 4.0
# A prompt's rows cost more from chunk to chunk, for they attend to more: what they cost counts half after seven others.
# At first they count like so many that cost what rows of sequences that decode do.
_PROMPT_FORGETTING = 0.9
_PRIOR_PROMPT_ROWS = 16.0
# A step that takes so many times what it should was held up by something else.
_HELD_UP = 2.0


class StepCost:
    """Seconds of a step = fixed + decoding rows * each + prompts' rows * what they cost lately.

    What the fixed part is (reading the weights, calls) and what a row adds differ between devices and models by orders
    of magnitude. The first two are the least squares over recent steps without prompts; what a step with some takes
    beyond them is the prompts'.
    """

    def __init__(self) -> None:
        self.row_cost = _PRIOR_ROW_COST  # What a row that decodes adds, in units of the fixed part.
        self._fixed_s = 0.0
        # Sums over steps without prompts, weighted: 1, rows, seconds, rows * rows, rows * seconds.
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        # Sums over steps with prompts beside others, weighted: the prompts' rows, and the seconds they took.
        self._prompt_rows = _PRIOR_PROMPT_ROWS
        self._prompt_seconds = 0.0

    def record(self, seconds: float, *, decoding: int, prompts: int) -> None:
        """A step took so long, with so many rows that decode and so many of prompts."""
        if decoding + prompts > _LONGEST_STEP or not decoding or seconds <= 0:  # A clock may stand still.
            return
        if not self._weight:
            if not prompts:
                self._begin(decoding, seconds)
            return
        alone_s = self._seconds_of(decoding)
        seconds = min(seconds, _HELD_UP * (alone_s + prompts * self._prompt_row_s))
        if prompts:
            self._prompt_rows = _PROMPT_FORGETTING * self._prompt_rows + prompts
            self._prompt_seconds = _PROMPT_FORGETTING * self._prompt_seconds + max(seconds - alone_s, 0.0)
            return
        self._forget()
        self._add(decoding, seconds, 1.0)
        self._fit()
        fixed_s = seconds / (1 + decoding * self.row_cost)
        self._fixed_s = _FORGETTING_FIXED * self._fixed_s + (1 - _FORGETTING_FIXED) * fixed_s

    def prompt_rows_within(self, slowdown: float, *, beside: int) -> float:
        """How many rows of prompts a step of `beside` rows may get, to take `slowdown` times as long as without."""
        if not self._weight:
            return (slowdown - 1) * (1 / self.row_cost + beside)
        return (slowdown - 1) * self._seconds_of(beside) / self._prompt_row_s

    @property
    def _prompt_row_s(self) -> float:
        return max(self._prompt_seconds / self._prompt_rows, self._fixed_s * _SMALLEST_ROW_COST)

    def _seconds_of(self, rows: int) -> float:
        return self._fixed_s * (1 + rows * self.row_cost)

    def _begin(self, rows: int, seconds: float) -> None:
        self._fixed_s = seconds / (1 + rows * self.row_cost)
        for prior in _PRIOR_STEPS:
            self._add(prior, self._seconds_of(prior), _PRIOR_WEIGHT)
        self._prompt_seconds = self._prompt_rows * self.row_cost * self._fixed_s

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
            self.row_cost = min(max(each_s / fixed_s, _SMALLEST_ROW_COST), _LARGEST_ROW_COST)
