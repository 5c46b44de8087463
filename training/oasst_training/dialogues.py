"""The dialogues that the demo model learns: one JSON object per line of `dialogues.jsonl`.

    {"messages": [{"role": "prompter", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}],
     "wordings": ["Hello!", "Good morning!"]}

`messages` alternate from a prompter's to an assistant's; `wordings` are other ways to ask the first question.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oasst.prompt import ControlToken, Part, Speaker, Turn, check_turns, format_prompt

from oasst_training.errors import DataError
from oasst_training.json_lines import numbered_lines

__all__ = ["DIALOGUES_PATH", "Dialogue", "format_dialogue", "load_dialogues"]

DIALOGUES_PATH = Path(__file__).with_name("dialogues.jsonl")

_SPEAKERS = {"prompter": Speaker.PROMPTER, "assistant": Speaker.ASSISTANT}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that ends with the assistant's turn."""

    turns: tuple[Turn, ...]
    # Other ways to ask the first question. The replies stay the same.
    wordings: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The first turn's text."""
        return self.turns[0].text

    @property
    def questions(self) -> tuple[str, ...]:
        """Every way to ask the first question."""
        return (self.question, *self.wordings)

    def asked_as(self, question: str) -> tuple[Turn, ...]:
        """The turns, with the first question worded so."""
        return (Turn(Speaker.PROMPTER, question), *self.turns[1:])

    def renditions(self) -> Iterator[tuple[Turn, ...]]:
        """The turns once for every way to ask the first question."""
        return map(self.asked_as, self.questions)


def load_dialogues(path: Path = DIALOGUES_PATH) -> list[Dialogue]:
    """The dialogues of a file, in its order.

    Raises:
        DataError: naming the file and the line that is not a dialogue.
    """
    dialogues = []
    for number, line in numbered_lines(path):
        try:
            dialogues.append(_parse_dialogue(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: not a dialogue: {error!r}") from error
    return dialogues


def format_dialogue(turns: Sequence[Turn]) -> list[Part]:
    """The parts of a whole dialogue: the prompt for its last reply, that reply and its end."""
    return [*format_prompt(turns[:-1]), turns[-1].text, ControlToken.END_OF_TEXT]


def _parse_dialogue(row: dict[str, Any]) -> Dialogue:
    turns = tuple(Turn(_SPEAKERS[message["role"]], message["content"]) for message in row["messages"])
    check_turns(turns[:-1])
    if turns[-1].speaker is not Speaker.ASSISTANT:
        raise ValueError("the last message must be the assistant's")
    return Dialogue(turns, tuple(row.get("wordings", ())))
