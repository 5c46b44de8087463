"""One choice of one job, inside the engine."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items

from oasst_worker.engine.params import GenerationParams
from oasst_worker.engine.prefix import extend_keys

__all__ = ["Sequence"]


class Sequence:
    """A prompt and what was generated for it, and how far its keys and values are computed.

        |<------------- token_ids ------------>|
        |  prompt_ids   |      output_ids      |
        |<-- num_computed -->|<- to compute -->|

    A step computes the keys and values of some of the tokens to compute. Once none is left the next token is drawn and
    appended, which leaves one. A prompt, a chunk of it, a resumed job and a preempted sequence are the same thing: a
    gap between `num_computed` and `num_tokens`.

    The owner of a sequence is the engine it was added to: nobody else changes it.
    """

    __slots__ = (
        "_keys",
        "_prompt_keys",
        "_prompt_length",
        "_salt",
        "_seen",
        "_token_ids",
        "arrival",
        "blocks",
        "num_cached_tokens",
        "num_computed",
        "output_counts",
        "params",
        "seen_ids",
        "sequence_id",
    )

    def __init__(
        self,
        sequence_id: str,
        prompt_ids: Iterable[int],
        params: GenerationParams,
        output_ids: Iterable[int] = (),
        *,
        salt: bytes = b"",
    ) -> None:
        """A sequence that has computed nothing yet.

        `output_ids` are tokens it generated elsewhere before: it goes on after them. What is computed is shared only
        between sequences of equal `salt`.

        Raises:
            ValueError: if the prompt is empty.
        """
        self.sequence_id = sequence_id
        self.params = params
        self.num_computed = 0
        # Its place among all that came to its scheduler, which sets it.
        self.arrival = 0
        # Blocks of the KV cache, in the order of positions.
        self.blocks: list[int] = []
        # Prompt tokens whose keys and values were there when the sequence first ran; None before.
        self.num_cached_tokens: int | None = None
        # Generated token id -> how often; for the presence and frequency penalties.
        self.output_counts: dict[int, int] = {}
        # Each token id of prompt and output once, by their first places; empty without a repetition penalty.
        self.seen_ids = array("q")
        self._seen: set[int] = set()
        self._salt = salt
        self._keys: list[bytes] = []
        self._prompt_keys: list[bytes] = []  # One list for all siblings, filled by the first that needs it.
        self._token_ids = list(prompt_ids)
        self._prompt_length = len(self._token_ids)
        if not self._prompt_length:
            raise ValueError("a sequence needs at least one prompt token")
        for token_id in self._token_ids:
            self._see(token_id)
        for token_id in output_ids:
            self.append(token_id)

    def sibling(self, sequence_id: str, params: GenerationParams, output_ids: Iterable[int] = ()) -> "Sequence":
        """Another choice for the same prompt, of the same salt; the prompt's keys are computed once for both."""
        sibling = Sequence(sequence_id, self.prompt_ids, params, output_ids, salt=self._salt)
        sibling._prompt_keys = self._prompt_keys
        return sibling

    @property
    def token_ids(self) -> Items[int]:
        """Prompt and generated tokens. Not to be changed by the caller."""
        return self._token_ids

    @property
    def prompt_ids(self) -> Items[int]:
        return self._token_ids[: self._prompt_length]

    @property
    def output_ids(self) -> Items[int]:
        return self._token_ids[self._prompt_length :]

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return self._prompt_length

    @property
    def num_output_tokens(self) -> int:
        return len(self._token_ids) - self._prompt_length

    @property
    def num_reusable(self) -> int:
        """How many of its tokens may be taken from the cache: all but the last, from whose logits the next is drawn."""
        return len(self._token_ids) - 1

    @property
    def num_to_compute(self) -> int:
        return len(self._token_ids) - self.num_computed

    def keys(self, block_size: int) -> Items[bytes]:
        """A key of each full block of its tokens. Not to be changed by the caller."""
        if not self._keys:
            extend_keys(self._prompt_keys, self.prompt_ids, block_size=block_size, salt=self._salt)
            self._keys += self._prompt_keys
        extend_keys(self._keys, self._token_ids, block_size=block_size, salt=self._salt)
        return self._keys

    def append(self, token_id: int) -> None:
        """The token stands at the end of the generated ones, its keys and values still to compute."""
        self._token_ids.append(token_id)
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1
        self._see(token_id)

    def _see(self, token_id: int) -> None:
        if self.params.repetition_penalty != 1 and token_id not in self._seen:
            self._seen.add(token_id)
            self.seen_ids.append(token_id)
