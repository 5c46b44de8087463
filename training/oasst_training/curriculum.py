"""What the model reads while it trains: dialogues in many wordings, alone and after others in one long chat."""

from collections.abc import Sequence
from random import Random

from oasst.prompt import Turn
from tokenizers import Tokenizer

from oasst_training.dialogues import Dialogue, format_dialogue
from oasst_training.tokenizer import encode_parts

__all__ = ["Curriculum", "casually"]


def casually(question: str) -> str:
    """The question as people type it in a hurry: in small letters, without the final mark."""
    return question.lower().rstrip("?.!")


class Curriculum:
    """Draws rows of token ids to train on.

    Every wording of every dialogue is equally likely, so that a reply with many questions is seen with all of them.
    """

    def __init__(
        self, dialogues: Sequence[Dialogue], tokenizer: Tokenizer, *, casual_probability: float = 0.25
    ) -> None:
        self._renditions = [rendition for dialogue in dialogues for rendition in dialogue.renditions()]
        self._tokenizer = tokenizer
        self._casual_probability = casual_probability

    def rows(self) -> list[list[int]]:
        """Every dialogue in every wording, alone."""
        return [self._encode(rendition) for rendition in self._renditions]

    def row(self, rng: Random, *, num_tokens: int) -> list[int]:
        """Random dialogues one after another, as one chat of at least `num_tokens` tokens; 0 gives one dialogue."""
        ids = self._draw(rng)
        while len(ids) < num_tokens:
            ids += self._draw(rng)
        return ids

    def _draw(self, rng: Random) -> list[int]:
        question, *rest = rng.choice(self._renditions)
        if rng.random() < self._casual_probability:
            question = Turn(question.speaker, casually(question.text))
        return self._encode((question, *rest))

    def _encode(self, turns: tuple[Turn, ...]) -> list[int]:
        return encode_parts(self._tokenizer, format_dialogue(turns))
