"""Instructions in Alpaca's form become conversations of one exchange.

    {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}

The prompter says the instruction and, on a new line, the input if there is one; the assistant says the output.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from oasst.prompt import Speaker, Turn
from pydantic import BaseModel

from oasst_training.errors import DataError
from oasst_training.json_lines import numbered_lines

__all__ = ["Instruction", "read_instructions"]


class Instruction(BaseModel):
    """One entry. Keys that training does not need are not kept."""

    instruction: str
    input: str = ""
    output: str

    def turns(self) -> tuple[Turn, ...]:
        """The exchange it stands for."""
        question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
        return (Turn(Speaker.PROMPTER, question), Turn(Speaker.ASSISTANT, self.output))


def read_instructions(path: Path) -> list[Instruction]:
    """The instructions of a file: JSON lines, or one JSON list if the name ends in `.json`.

    Raises:
        DataError: naming the file and the line, or the entry counted from 1, that is not an instruction.
    """
    instructions = []
    for number, entry in _entries(path):
        try:
            instructions.append(Instruction.model_validate(json.loads(entry) if isinstance(entry, str) else entry))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not an instruction: {error}") from error
    return instructions


def _entries(path: Path) -> Iterable[tuple[int, Any]]:
    """Lines of JSON, or objects of a JSON list, with their numbers."""
    if path.suffix != ".json":
        return numbered_lines(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: must hold a list of instructions")
    return enumerate(entries, start=1)
