"""Text to token ids and back, by the checkpoint's own tokenizer files.

Two encoders share one vocabulary. The *text* encoder never forms a control token: what a person types stays text,
however it is split over fields. The *prompt* encoder parses control tokens, for callers trusted to form turns.

The library's calls for one text hold Python's lock to their end; those for a batch let other threads run meanwhile. So
each text is a batch of one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from oasst.prompt import ControlToken, Part
from tokenizers import Tokenizer

from oasst_gateway.errors import StartError

__all__ = ["ControlTokenInTextError", "ModelTokenizer"]

# Read by the library at each call. Otherwise all texts would wait in line for threads of its own: a short one, encoded
# in the event loop, behind long ones. So each is encoded by the thread that asks.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_REQUIRED = (ControlToken.PROMPTER, ControlToken.ASSISTANT, ControlToken.END_OF_TEXT)


class ControlTokenInTextError(ValueError):
    """Plain text was encoded to a control token, which the tokenizer files should make impossible."""


class ModelTokenizer:
    """A checkpoint's tokenizer, safe for text from outside."""

    def __init__(self, tokenizer_json: str) -> None:
        """Reads the content of a `tokenizer.json`.

        Raises:
            StartError: if it is none, lacks a token that forms turns, or encodes one from plain text.
        """
        files = _parse(tokenizer_json)
        control_ids = _mark_control_tokens(files)
        marked = json.dumps(files)
        self._prompt_encoder = _load(marked)
        self._text_encoder = _load(marked)
        self._text_encoder.encode_special_tokens = True
        vocabulary = self._prompt_encoder.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        # No token stands for more characters than this, so a text of N characters has at least N / longest_token ids.
        self.longest_token = max(map(len, vocabulary))
        self._control_ids = frozenset(control_ids.values())
        self.control_ids: Mapping[ControlToken, int] = MappingProxyType(
            {token: control_ids[token.value] for token in ControlToken if token.value in control_ids}
        )
        self._check_safety(control_ids)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelTokenizer":
        """The tokenizer of the checkpoint in `folder`."""
        path = folder / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"cannot read {path}: {error}") from error

    def encode_part(self, part: Part) -> Sequence[int]:
        """The ids of a piece of a prompt: a control token by its id, text with control tokens off.

        Raises:
            ControlTokenInTextError: if the text encodes to a control token all the same.
        """
        return (self.control_ids[part],) if isinstance(part, ControlToken) else self.encode_text(part)

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text; no control token is among them.

        Raises:
            ControlTokenInTextError: rather than returning one.
        """
        ids = _encode(self._text_encoder, text)
        if not self._control_ids.isdisjoint(ids):
            raise ControlTokenInTextError("plain text encodes to a control token")
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of text whose control tokens are meant as such."""
        return _encode(self._prompt_encoder, text)

    def decode(self, ids: Sequence[int], *, skip_control_tokens: bool) -> str:
        """The text of `ids`; bytes that form no character become U+FFFD."""
        texts: list[str] = self._prompt_encoder.decode_batch([ids], skip_special_tokens=skip_control_tokens)
        return texts[0]

    def _check_safety(self, control_ids: Mapping[str, int]) -> None:
        for token in _REQUIRED:
            if token not in self.control_ids:
                raise StartError(f"tokenizer.json has no added token {token.value}, which forms turns")
        for content in control_ids:
            try:
                self.encode_text(content)
            except ControlTokenInTextError as error:
                raise StartError(f"tokenizer.json turns plain text into the control token {content}") from error


def _encode(encoder: Tokenizer, text: str) -> list[int]:
    ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _parse(tokenizer_json: str) -> dict[str, Any]:  # Any: the shape of a JSON file that tokenizers owns.
    try:
        files = json.loads(tokenizer_json)
    except json.JSONDecodeError as error:
        raise StartError(f"tokenizer.json is not JSON: {error}") from error
    if not isinstance(files, dict):
        raise StartError("tokenizer.json is not a tokenizer")
    return files


def _mark_control_tokens(files: dict[str, Any]) -> dict[str, int]:
    """Flags every control token as special, in place; returns their ids by content.

    Only tokens flagged special stay text under `encode_special_tokens`, and not every checkpoint flags the tokens that
    form its turns. Other added tokens (GPT-NeoX has one for each run of spaces) belong to text and stay as they are.
    """
    names = {token.value for token in ControlToken}
    control_ids = {}
    for token in files.get("added_tokens", []):
        token["special"] = token["special"] or token["content"] in names
        if token["special"]:
            control_ids[token["content"]] = token["id"]
    return control_ids


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        encoder = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # tokenizers raises a bare Exception for every fault in the file.
        raise StartError(f"tokenizer.json is not a tokenizer: {error}") from error
    # What a training left in the file: a prompt would silently be cut, or lengthened.
    encoder.no_truncation()
    encoder.no_padding()
    return encoder
