"""How the tokens of one sequence are drawn and when it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["GenerationParams"]


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Every value resolved; the meaning and the range of each stands in `oasst/v1/generation.proto`."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0 takes the most likely token.
    top_k: int = 0  # 0 is off.
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0
    choice: int = 0  # With the seed and the position it decides a token's random number.
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None  # Alternatives to return with each token; None returns no log-probabilities.

    @property
    def counts_tokens(self) -> bool:
        """A draw depends on how often each token was generated before."""
        return bool(self.presence_penalty or self.frequency_penalty)
