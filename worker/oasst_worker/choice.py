"""One choice of one job as it runs: its sequence in the engine, and the text its tokens become."""

from dataclasses import dataclass

from oasst.v1.generation_pb2 import ChoiceFinish
from oasst.v1.generation_pb2 import FinishReason as WireReason

from oasst_worker.detokenizer import ChoiceText
from oasst_worker.engine import FinishReason, Sequence, TokenLogprob, TokenOutput
from oasst_worker.parts import PartError

__all__ = ["Choice", "ChoiceOutput"]

_WIRE_REASONS = {
    FinishReason.END_OF_TEXT: WireReason.FINISH_REASON_END_OF_TEXT,
    FinishReason.STOP_TOKEN: WireReason.FINISH_REASON_STOP,
    FinishReason.LENGTH: WireReason.FINISH_REASON_LENGTH,
}
# The last tokens of these end a choice without being part of its text.
_SILENT_ENDS = frozenset({FinishReason.END_OF_TEXT, FinishReason.STOP_TOKEN})


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """What one step gave one choice: a token with the text it made final, or an error."""

    part: "Choice"
    token_id: int | None = None  # None with an error only.
    text: str = ""
    logprob: TokenLogprob | None = None
    finish: ChoiceFinish | None = None
    error: PartError | None = None

    @property
    def has_ended(self) -> bool:
        return self.finish is not None or self.error is not None


class Choice:
    """One answer to a prompt."""

    __slots__ = ("_text", "index", "sequence")

    def __init__(self, index: int, sequence: Sequence, text: ChoiceText) -> None:
        self.index = index
        self.sequence = sequence
        self._text = text

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were in the KV cache already; settled before the first output."""
        return self.sequence.num_cached_tokens or 0

    def take(self, output: TokenOutput) -> ChoiceOutput:
        """The output as its caller is to see it. A finish here that the engine did not tell is a stop text."""
        if output.token_id is None:
            return self.fail(PartError("NUMERIC", output.error or "the token could not be computed"))
        text = "" if output.finish in _SILENT_ENDS else self._text.add(output.token_id)
        if output.finish is None and self._text.stop is None:
            return ChoiceOutput(self, output.token_id, text, output.logprob)
        text += self._text.finish()
        return ChoiceOutput(self, output.token_id, text, output.logprob, finish=self._finish(output))

    def fail(self, error: PartError) -> ChoiceOutput:
        return ChoiceOutput(self, error=error)

    def _finish(self, output: TokenOutput) -> ChoiceFinish:
        if output.finish is None or self._text.stop is not None:
            return ChoiceFinish(choice=self.index, reason=WireReason.FINISH_REASON_STOP, stop=self._text.stop)
        stop_token_id = output.token_id if output.finish is FinishReason.STOP_TOKEN else None
        return ChoiceFinish(choice=self.index, reason=_WIRE_REASONS[output.finish], stop_token_id=stop_token_id)
