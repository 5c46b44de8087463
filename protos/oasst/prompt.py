"""The OASST prompt format, once: turns become parts, and parts are what a tokenizer may encode.

A prompt is `<|prompter|>Q1<|endoftext|><|assistant|>A1<|endoftext|><|prompter|>Q2<|endoftext|><|assistant|>`: nothing
stands between a control token and the text beside it, and no text is changed. Because control tokens and texts are
separate parts, text is encoded with control tokens off, and what a person types can never become a turn.

    >>> turns = [Turn(Speaker.PROMPTER, "What is a meme?")]
    >>> [part if isinstance(part, str) else part.value for part in format_prompt(turns)]
    ['<|prompter|>', 'What is a meme?', '<|endoftext|>', '<|assistant|>']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["ControlToken", "Part", "Speaker", "Turn", "TurnOrderError", "check_turns", "drop_oldest", "format_prompt"]


class ControlToken(Enum):
    """A token that forms turns. Its id differs between checkpoints: it stands in their tokenizer files."""

    PROMPTER = "<|prompter|>"
    ASSISTANT = "<|assistant|>"
    END_OF_TEXT = "<|endoftext|>"
    SYSTEM = "<|system|>"
    PREFIX_BEGIN = "<|prefix_begin|>"
    PREFIX_END = "<|prefix_end|>"
    PADDING = "<|padding|>"


class Speaker(Enum):
    """Who speaks a turn."""

    PROMPTER = ControlToken.PROMPTER
    ASSISTANT = ControlToken.ASSISTANT


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    speaker: Speaker
    text: str


# A piece of a prompt: a control token by name, or text that is encoded with control tokens off.
Part = ControlToken | str


class TurnOrderError(ValueError):
    """The turns do not alternate from a prompter's first to a prompter's last."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def check_turns(turns: Sequence[Turn]) -> None:
    """Prompter and assistant speak in turn, a prompter first and last.

    Raises:
        TurnOrderError: with the index of the first turn that is out of order.
    """
    if not turns:
        raise TurnOrderError(0, "a conversation needs at least one prompter turn")
    for index, turn in enumerate(turns):
        expected = Speaker.ASSISTANT if index % 2 else Speaker.PROMPTER
        if turn.speaker is not expected:
            raise TurnOrderError(index, f"turn {index} must be the {expected.name.lower()}'s")
    if turns[-1].speaker is not Speaker.PROMPTER:
        raise TurnOrderError(len(turns) - 1, "the last turn must be the prompter's: the assistant speaks next")


def format_prompt(turns: Sequence[Turn], *, system: str = "") -> list[Part]:
    """The parts of a prompt that ask the assistant for its next turn.

    `system` stands as plain text before the first prompter turn: the model was not trained on a system turn, and this
    is where its authors place such text (LAION-AI/Open-Assistant#2896).

    Raises:
        TurnOrderError: if the turns do not alternate.
    """
    check_turns(turns)
    parts: list[Part] = [system] if system else []
    for turn in turns:
        parts += [turn.speaker.value, turn.text, ControlToken.END_OF_TEXT]
    parts.append(ControlToken.ASSISTANT)
    return parts


def drop_oldest(turns: Sequence[Turn]) -> Sequence[Turn]:
    """The conversation without its oldest exchange (a prompter's turn and its answer); empty if none may go."""
    return turns[2:]
