"""What is sent: prompts from a file or drawn at random, and how much of an answer is asked for. Pure."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from oasst_client import ChatOptions, Message, MessageLike, Model, Role

__all__ = ["Lengths", "PromptFile", "RandomPrompts", "Request", "Workload", "WorkloadError"]

_LENGTHS = re.compile(r"(?P<only>\d+)|(?P<low>\d+)-(?P<high>\d+)|(?P<mean>\d+)~(?P<deviation>\d+)")


class WorkloadError(Exception):
    """What is to be sent cannot be; says what to change."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: exactly one of messages and token_ids is set."""

    options: ChatOptions
    messages: Sequence[MessageLike] | None = None
    token_ids: Sequence[int] | None = None


class Workload(Protocol):
    """Where requests come from."""

    def draw(self, random: Random) -> Request: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens: uniform from `low` to `high`, or normal around `mean`, at least 1."""

    low: int = 1
    high: int = 1
    mean: int | None = None
    deviation: int = 0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """The distribution that `128`, `64-256` or `128~32` (mean and standard deviation) stands for.

        >>> Lengths.parse("64-256")
        Lengths(low=64, high=256, mean=None, deviation=0)

        Raises:
            WorkloadError: it stands for none.
        """
        match = _LENGTHS.fullmatch(text)
        if not match:
            raise WorkloadError(f"{text!r} is no length; write 128, 64-256 or 128~32 (mean~standard deviation)")
        given = {name: int(number) for name, number in match.groupdict().items() if number}
        if "mean" in given:
            return cls(mean=given["mean"], deviation=given["deviation"])
        low = given.get("only", given.get("low", 0))
        high = given.get("only", given.get("high", 0))
        if not 1 <= low <= high:
            raise WorkloadError(f"{text!r}: lengths are at least 1, the smaller one first")
        return cls(low=low, high=high)

    def draw(self, random: Random) -> int:
        if self.mean is not None:
            return max(1, round(random.gauss(self.mean, self.deviation)))
        return random.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """Prompts of random tokens, as token ids: their lengths are exact. All begin with the same `num_shared` tokens.

    Answers are as long as drawn, whatever the model would have said.
    """

    model: Model
    prompt_tokens: Lengths
    output_tokens: Lengths
    num_shared: int
    seed: int

    def draw(self, random: Random) -> Request:
        output_tokens = min(self.output_tokens.draw(random), self.model.max_new_tokens)
        # What is asked for must fit; the longest prompts are cut rather than refused.
        most = min(self.model.max_prompt_tokens, self.model.max_positions - output_tokens)
        num_tokens = max(1, min(self.num_shared + self.prompt_tokens.draw(random), most))
        shared = self._draw_ids(Random(self.seed), min(self.num_shared, num_tokens))
        return Request(
            options=_exact_output(output_tokens),
            token_ids=[*shared, *self._draw_ids(random, num_tokens - len(shared))],
        )

    def _draw_ids(self, random: Random, num_ids: int) -> list[int]:
        """Ids of ordinary tokens. Control tokens are left out: they would make turns."""
        tokens = self.model.control_tokens
        control = {
            *(tokens.prompter, tokens.assistant, tokens.end_of_text),
            *(tokens.system, tokens.prefix_begin, tokens.prefix_end, tokens.padding),
        }
        ids: list[int] = []
        while len(ids) < num_ids:
            if (drawn := random.randrange(self.model.tokenizer_size)) not in control:
                ids.append(drawn)
        return ids


@dataclass(frozen=True, slots=True)
class PromptFile:
    """Prompts of a JSON Lines file, each drawn at random."""

    prompts: Sequence[Sequence[MessageLike]]
    # None: the model ends its answers itself.
    output_tokens: Lengths | None

    @classmethod
    def read(cls, path: Path, output_tokens: Lengths | None) -> "PromptFile":
        """The prompts of the file: each line a string, `{"prompt": ...}` or `{"messages": [...]}`.

        Raises:
            WorkloadError: the file cannot be read, has a line of another form, or no line.
        """
        try:
            # Not `splitlines`: a JSON string may hold U+2028 and the like as they are.
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkloadError(f"{path} cannot be read: {error}") from error
        prompts = [_messages(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not prompts:
            raise WorkloadError(f"{path} has no prompts")
        return cls(prompts, output_tokens)

    def draw(self, random: Random) -> Request:
        options: ChatOptions = {}
        if self.output_tokens:
            options = _exact_output(self.output_tokens.draw(random))
        return Request(options=options, messages=random.choice(self.prompts))


def _exact_output(num_tokens: int) -> ChatOptions:
    return {"max_new_tokens": num_tokens, "ignore_eos": True}


def _messages(line: str, where: str) -> list[MessageLike]:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise WorkloadError(f"{where} is not JSON: {error}") from error
    match entry:
        case str() | {"prompt": str()}:
            return [("user", entry if isinstance(entry, str) else entry["prompt"])]
        case {"messages": [*messages]}:
            return [_message(each, f"{where}: messages[{index}]") for index, each in enumerate(messages)]
    raise WorkloadError(f'{where} must be a string, {{"prompt": ...}} or {{"messages": [...]}}')


def _message(value: Any, where: str) -> Message:
    match value:
        case {"role": role, "content": str(content), **others} if role in tuple(Role) and not others:
            return Message(Role(role), content)
    raise WorkloadError(f"{where} must have a role ({', '.join(Role)}) and a content, a text, and nothing else")
