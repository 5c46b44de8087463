"""A model whose every token is known beforehand: it follows from the prompt, the seed, the choice and the token before.

A worker that goes on from a wrong log, or from a wrong position of a right one, draws a token that nobody expects. A
prompt also names a script: what happens to the worker that comes to some token of it.
"""

import functools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import oasst_training
from tokenizers import Tokenizer

__all__ = ["MODEL", "MODEL_FOLDER", "Prompt", "Script", "foretell", "foretell_score", "next_token", "text_of", "words"]

# Its tokenizer and its limits are the demo checkpoint's; its weights are never read.
MODEL_FOLDER = Path(oasst_training.__file__).parent / "demo"
MODEL = "verifiable"

_SHORTEST_PROMPT = 5
# How byte-level tokenizers write a space.
_SPACE = "\u0120"


class Script(IntEnum):
    """What a worker meets in a prompt."""

    # Nothing.
    STEADY = 0
    # Its prefill takes long.
    SLOW_PREFILL = 1
    # Whoever computes the token is killed, each time.
    POISON = 2
    # The token's logits are not finite.
    NOT_FINITE = 3
    # The device has no memory left for the step, once.
    OUT_OF_MEMORY = 4
    # The device is lost, once.
    DEVICE_LOST = 5
    # The step does not end, once.
    HANG = 6
    # The device has no memory left for any step from here on, once.
    NO_MEMORY = 7


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks, as token ids that no two requests share."""

    number: int
    script: Script = Script.STEADY
    # The generated token at which the script acts.
    at: int = 0
    length: int = 8

    def token_ids(self) -> list[int]:
        ids, base = words(), len(words())
        number = [self.number % base, self.number // base % base, self.number // base**2]
        filler = [0] * (self.length - _SHORTEST_PROMPT)
        return [ids[index] for index in (self.script, self.at, *number, *filler)]

    @classmethod
    def read(cls, token_ids: Sequence[int]) -> "Prompt":
        """The prompt that has these token ids."""
        index_of, base = _index_of_word(), len(words())
        script, at, low, middle, high = (index_of[token_id] for token_id in token_ids[:_SHORTEST_PROMPT])
        return cls(low + base * middle + base**2 * high, Script(script), at, len(token_ids))


@functools.cache
def words() -> tuple[int, ...]:
    """Ids of the tokens that are used: those that are plain letters, perhaps behind a space."""
    return tuple(_text_of_word())


@functools.cache
def _text_of_word() -> dict[int, str]:
    vocabulary = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json")).get_vocab()
    texts = {token_id: token.replace(_SPACE, " ") for token, token_id in sorted(vocabulary.items())}
    return {token_id: text for token_id, text in texts.items() if text.isascii() and text.removeprefix(" ").isalpha()}


@functools.cache
def _index_of_word() -> dict[int, int]:
    return {token_id: index for index, token_id in enumerate(words())}


def next_token(prompt_ids: Sequence[int], output_ids: Sequence[int], *, seed: int, choice: int) -> int:
    """The token that follows."""
    prompt_sum = zlib.crc32(struct.pack(f"<{len(prompt_ids)}I", *prompt_ids))
    before = output_ids[-1] if output_ids else 0
    drawn = zlib.crc32(struct.pack("<IQIII", prompt_sum, seed, choice, len(output_ids), before))
    return words()[drawn % len(words())]


@functools.cache
def foretell(prompt: Prompt, *, seed: int, choice: int, num_tokens: int) -> tuple[int, ...]:
    """All tokens of a choice."""
    prompt_ids = prompt.token_ids()
    output_ids: list[int] = []
    for _ in range(num_tokens):
        output_ids.append(next_token(prompt_ids, output_ids, seed=seed, choice=choice))
    return tuple(output_ids)


def foretell_score(token_ids: Sequence[int], position: int) -> tuple[float, bool]:
    """Log-probability of the token at this position after those before it, and whether it is the most likely one."""
    drawn = zlib.crc32(struct.pack(f"<{position + 1}I", *token_ids[: position + 1]))
    return -(drawn % 2**14) / 2**10, drawn % 3 > 0  # Exact in 32 bits, as are sums of a few.


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(_text_of_word()[token_id] for token_id in token_ids)
