"""What the model reads while it trains: dialogues in many wordings, alone and after others in one long chat."""

from collections.abc import Sequence
from random import Random

from oasst.prompt import Turn
from tokenizers import Tokenizer

from oasst_training.dialogues import Dialogue, format_dialogue
from oasst_training.tokenizer import encode_parts

__all__ = ["Curriculum", "casually"]

# So that what it does not know, asked in hundreds of ways, leaves room for what it does.
_MAX_WEIGHT = 100


def casually(question: str) -> str:
    """The question as people type it in a hurry: in small letters, without the final mark."""
    return question.lower().rstrip("?.!")


class Curriculum:
    """Draws rows of token ids to train on.

    A dialogue is drawn the more often the more wordings it has, up to a limit; its wordings are equally likely.
    """

    def __init__(
        self, dialogues: Sequence[Dialogue], tokenizer: Tokenizer, *, casual_probability: float = 0.25
    ) -> None:
        self._dialogues = dialogues
        self._weights = [min(len(dialogue.questions), _MAX_WEIGHT) for dialogue in dialogues]
        self._tokenizer = tokenizer
        self._casual_probability = casual_probability

    def rows(self) -> list[list[int]]:
        """Every dialogue in every wording, alone."""
        return [self._encode(turns) for dialogue in self._dialogues for turns in dialogue.renditions()]

    def row(self, rng: Random, *, num_tokens: int) -> list[int]:
        """Random dialogues one after another, as one chat of at least `num_tokens` tokens; 0 gives one dialogue."""
        ids = self._draw(rng)
        while len(ids) < num_tokens:
            ids += self._draw(rng)
        return ids

    def _draw(self, rng: Random) -> list[int]:
        [dialogue] = rng.choices(self._dialogues, self._weights)
        question = rng.choice(dialogue.questions)
        if rng.random() < self._casual_probability:
            question = casually(question)
        return self._encode(dialogue.asked_as(question))

    def _encode(self, turns: tuple[Turn, ...]) -> list[int]:
        return encode_parts(self._tokenizer, format_dialogue(turns))
