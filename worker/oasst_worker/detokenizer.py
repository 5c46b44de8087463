"""Token ids become text: whole characters only, and never a part of a stop text.

Everything here is a function of the token ids alone. So a worker that replays a job's logged ids stands exactly where
the worker before it stood, text held back included.
"""

import codecs
import json
from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer

__all__ = ["ChoiceText", "Detokenizer", "DetokenizerState", "StopMatcher", "UnsupportedTokenizerError"]


class UnsupportedTokenizerError(ValueError):
    """The tokenizer is not a byte-level one, as every GPT-NeoX checkpoint's is."""


class Detokenizer:
    """The bytes that each token of a byte-level tokenizer stands for.

    The texts of a sequence's states, concatenated, are `tokenizer.decode(ids, skip_special_tokens=True)`.

    >>> state = Detokenizer(Tokenizer.from_file("tokenizer.json")).start()  # doctest: +SKIP
    >>> state.add(12092) + state.add(1533) + state.finish()  # doctest: +SKIP
    'Hello world'
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            UnsupportedTokenizerError: if the tokenizer's tokens are not bytes.
        """
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise UnsupportedTokenizerError(f"the tokenizer's decoder is {decoder.get('type')}, not ByteLevel")
        self._token_bytes = _token_bytes(tokenizer)

    def start(self) -> "DetokenizerState":
        """The state before a sequence's first token."""
        return DetokenizerState(self._token_bytes)


class DetokenizerState:
    """Where one sequence stands between tokens: at most three bytes of an incomplete character are held back.

    Bytes that can no longer become a character turn into U+FFFD as soon as that is certain.
    """

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._token_bytes.get(token_id, b""))

    def finish(self) -> str:
        """What was held back: U+FFFD if a character stayed incomplete."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Lets text through up to the first stop text.

    The match is the one that is complete first when the text is read character by character, and the longest of those
    complete at the same character: how the text was cut into pieces does not matter.
    """

    __slots__ = ("_held", "_longest_prefix", "_prefixes", "_stops", "matched")

    def __init__(self, stops: Iterable[str]) -> None:
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._prefixes = frozenset(stop[:length] for stop in self._stops for length in range(1, len(stop)))
        self._longest_prefix = max(map(len, self._prefixes), default=0)
        self._held = ""  # The longest suffix of the text that may still become a stop text.

    def add(self, text: str) -> str:
        """The text that is now known to stand before any stop text; nothing once a stop text has matched."""
        if self.matched is not None or not text:
            return ""
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, self.matched = match
            self._held = ""
            return text[:start]
        shown = len(text) - self._held_length(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text held back: no more comes, so it is no stop text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _held_length(self, text: str) -> int:
        for length in range(min(len(text), self._longest_prefix), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0


class ChoiceText:
    """The text of one choice: its tokens' characters, up to a stop text.

    A stop text counts only in the text after the first `min_new_tokens` tokens.
    """

    __slots__ = ("_characters", "_num_unmatched_tokens", "_stops")

    def __init__(self, characters: DetokenizerState, stops: Iterable[str] = (), *, min_new_tokens: int = 0) -> None:
        self._characters = characters
        self._stops = StopMatcher(stops)
        self._num_unmatched_tokens = min_new_tokens

    @property
    def stop(self) -> str | None:
        """The stop text that matched. It and whatever followed it are dropped."""
        return self._stops.matched

    def add(self, token_id: int) -> str:
        """The text that became final with this token."""
        text = self._characters.add(token_id)
        if self._num_unmatched_tokens:
            self._num_unmatched_tokens -= 1
            return text
        return self._stops.add(text)

    def finish(self) -> str:
        """The rest of the text, once no token follows."""
        return self._stops.add(self._characters.finish()) + self._stops.finish()


def _token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Token id -> bytes, for every token that shows in a text."""
    byte_of = _byte_of_character()
    special_ids = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return {
        token_id: _bytes_of(token, byte_of)
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()
        if token_id not in special_ids
    }


def _bytes_of(token: str, byte_of: Mapping[str, int]) -> bytes:
    try:
        return bytes(byte_of[character] for character in token)
    except KeyError:  # An added token, such as a run of spaces, spells itself.
        return token.encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, those from U+0100 on for the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
