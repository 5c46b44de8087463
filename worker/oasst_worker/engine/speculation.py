"""Guesses of what a sequence will say, from what stands in it already: n-gram speculation, also called prompt lookup.

The source of the idea is Saxena's "Prompt Lookup Decoding" (2023). A guess costs a row of a step; it changes no token,
for each row is drawn as it would have been alone, and a guess is kept only where the draw before it gave the same.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from oasst_worker.engine.pace import StepCost
from oasst_worker.engine.sequence import Sequence

__all__ = ["Speculator"]

# The last tokens of a sequence are looked for by so many of them, the most first.
_NGRAM_SIZES = (3, 2)

# Of guesses that were tried, the share that is right: what is taken at first, how far each outcome moves it, and how
# far each step without a try moves it back, so that a bad stretch is not for ever.
_PRIOR_ACCEPTANCE = 0.5
_LEARNING_RATE = 0.1
_FORGETTING_RATE = 1 / 64


@dataclass(slots=True)
class _Guesses:
    """What is known of one sequence."""

    acceptance: float = _PRIOR_ACCEPTANCE
    num_indexed: int = 0  # Of its tokens, those that stand behind an indexed n-gram.
    continuations: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> position behind its last place.


class Speculator:
    """Decides how many tokens of which sequences are guessed, and learns from what becomes of them.

    A guess pays if its chance to be right exceeds the share of a step's time that its rows take; so the more rows a
    step has, the surer a guess must be, and a loaded engine guesses only where text repeats itself.
    """

    def __init__(self, max_drafts: int, cost: StepCost) -> None:
        """`max_drafts` is the most tokens guessed for a sequence in a step."""
        self._max_drafts = max_drafts
        self._cost = cost
        self._guesses: dict[Sequence, _Guesses] = {}
        # Tokens guessed, and those among them that were right, of all sequences that ever ran.
        self.num_drafted = 0
        self.num_accepted = 0

    def draft(self, sequence: Sequence, *, num_rows: int) -> tuple[int, ...]:
        """What may follow the sequence's last token, in a step of so many rows; often nothing."""
        params = sequence.params
        # The last token it may generate is drawn, never fed.
        longest = min(self._max_drafts, params.max_new_tokens - sequence.num_output_tokens - 1)
        guesses = self._guesses.setdefault(sequence, _Guesses())
        count = _affordable(guesses.acceptance, num_rows, longest, self._cost.row_cost)
        if not count:
            guesses.acceptance += _FORGETTING_RATE * (_PRIOR_ACCEPTANCE - guesses.acceptance)
            return ()
        return _look_up(guesses, sequence.token_ids, count)

    def record(self, sequence: Sequence, *, num_drafted: int, num_accepted: int) -> None:
        """So many of the tokens guessed for the sequence were right; the one behind them, if there was one, was not."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        guesses = self._guesses[sequence]
        for _ in range(num_accepted):
            guesses.acceptance += _LEARNING_RATE * (1 - guesses.acceptance)
        if num_accepted < num_drafted:
            guesses.acceptance -= _LEARNING_RATE * guesses.acceptance

    def forget(self, sequence: Sequence) -> None:
        """The sequence has gone."""
        self._guesses.pop(sequence, None)


def _affordable(acceptance: float, num_rows: int, longest: int, row_cost: float) -> int:
    """How many tokens to guess: the k-th is right with `acceptance`^k, and its row must pay."""
    count, chance = 0, acceptance
    while count < longest and chance > row_cost * num_rows / (1 + row_cost * num_rows):
        count, chance, num_rows = count + 1, chance * acceptance, num_rows + 1
    return count


def _look_up(guesses: _Guesses, token_ids: Items[int], count: int) -> tuple[int, ...]:
    """What followed the last tokens where they stood before, `count` tokens of it, or nothing."""
    for end in range(max(guesses.num_indexed, 1), len(token_ids)):
        for size in _NGRAM_SIZES:
            if size <= end:
                guesses.continuations[tuple(token_ids[end - size : end])] = end
    guesses.num_indexed = len(token_ids)
    for size in _NGRAM_SIZES:
        start = guesses.continuations.get(tuple(token_ids[-size:]))
        if start is not None:
            # Where the two places overlap, the text repeats itself and so does the guess.
            period = len(token_ids) - start
            return tuple(token_ids[start + offset % period] for offset in range(count))
    return ()
