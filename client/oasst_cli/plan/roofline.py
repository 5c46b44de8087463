"""How long a step of the model takes at best, from the shapes of model and card. Pure arithmetic.

A step reads all weights and the KV cache of the sequences in it, and multiplies every token of it with the weights. It
takes at least as long as the slower of the two, and on several cards the time of their all-reduces as well. What a real
engine reaches is a share of that: the caller's `efficiency`.
"""

from dataclasses import dataclass

__all__ = ["CARDS", "PYTHIA_12B", "Card", "Machine", "ModelShape", "StepWork"]

# Of the memory that the weights leave, as the worker takes for its KV cache.
_CACHE_SHARE = 0.85


@dataclass(frozen=True)
class ModelShape:
    """A GPT-NeoX."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    num_heads: int
    bytes_per_value: int = 2
    kv_bytes_per_value: int = 2

    @property
    def num_layer_values(self) -> int:
        """Weights of all layers: attention 4 h^2, MLP 8 h^2, their biases and two layer norms 13 h."""
        return self.num_layers * (12 * self.hidden_size**2 + 13 * self.hidden_size)

    @property
    def weight_bytes(self) -> int:
        """Held: layers, the embedding, the output layer and the last layer norm."""
        embeddings = 2 * self.vocab_size * self.hidden_size + 2 * self.hidden_size
        return self.bytes_per_value * (self.num_layer_values + embeddings)

    @property
    def bytes_read_per_step(self) -> int:
        """All weights but the embedding, of which a step reads a row for each token."""
        return self.weight_bytes - self.bytes_per_value * self.vocab_size * self.hidden_size

    def can_be_split(self, num_cards: int) -> bool:
        """Whether each card gets as many heads, and as much of the MLP, as every other."""
        return self.num_heads % num_cards == 0 and 4 * self.hidden_size % num_cards == 0

    @property
    def kv_bytes_per_token(self) -> int:
        """A key and a value in every layer.

        >>> PYTHIA_12B.kv_bytes_per_token
        737280
        """
        return 2 * self.num_layers * self.hidden_size * self.kv_bytes_per_value


PYTHIA_12B = ModelShape(num_layers=36, hidden_size=5120, vocab_size=50288, max_positions=2048, num_heads=40)


@dataclass(frozen=True)
class Link:
    """From a card to the others of its machine."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Card:
    """A GPU, as it performs: what was measured, or nine tenths of what its maker tells."""

    name: str
    memory_bytes: float
    read_bytes_per_s: float
    flop_per_s: float  # In fp16, dense.
    link: Link
    is_measured: bool = False


_NVLINK = Link(bytes_per_s=300e9, latency_s=15e-6)
_PCIE = Link(bytes_per_s=16e9, latency_s=100e-6)

CARDS = {
    card.name: card
    for card in (
        Card("H200", 149.3e9, 4.30e12, 790e12, _NVLINK, is_measured=True),
        Card("H100", 85.5e9, 3.00e12, 790e12, _NVLINK),
        Card("A100-80", 85.9e9, 1.74e12, 250e12, _NVLINK),
        Card("A100-40", 42.4e9, 1.40e12, 250e12, _NVLINK),
        Card("L40S", 48.3e9, 0.78e12, 290e12, _PCIE),
        Card("A10G", 24.1e9, 0.54e12, 63e12, _PCIE),
        Card("L4", 24.1e9, 0.27e12, 100e12, _PCIE),
        Card("T4", 16.1e9, 0.29e12, 30e12, _PCIE),
    )
}


@dataclass(frozen=True)
class StepWork:
    """What one step computes."""

    num_tokens: int  # Of prompts and of decoding sequences.
    num_sequences: int  # In it; each draws at most one token.
    cached_tokens: float  # Whose keys and values are read, over all its sequences.
    # Token by token, how many it attends to, summed up.
    attended_tokens: float


@dataclass(frozen=True)
class Machine:
    """One worker: a model split over so many cards."""

    card: Card
    num_cards: int = 1
    model: ModelShape = PYTHIA_12B
    # What a real engine reaches of the floor.
    efficiency: float = 0.7

    @property
    def kv_tokens(self) -> int:
        """Positions of KV cache; negative if not even the weights fit."""
        free = self.num_cards * self.card.memory_bytes - self.model.weight_bytes
        return int(_CACHE_SHARE * free / self.model.kv_bytes_per_token)

    def step_s(self, work: StepWork) -> float:
        """How long the step takes."""
        return max(self.read_s(work), self.compute_s(work)) / self.efficiency + self.reduce_s(work)

    def read_s(self, work: StepWork) -> float:
        read_bytes = self.model.bytes_read_per_step + work.cached_tokens * self.model.kv_bytes_per_token
        return read_bytes / (self.num_cards * self.card.read_bytes_per_s)

    def compute_s(self, work: StepWork) -> float:
        model = self.model
        layers = 2 * model.num_layer_values * work.num_tokens
        output = 2 * model.vocab_size * model.hidden_size * work.num_sequences
        # The products of queries with keys, and of those with values.
        attention = 4 * model.num_layers * model.hidden_size * work.attended_tokens
        return (layers + output + attention) / (self.num_cards * self.card.flop_per_s)

    def reduce_s(self, work: StepWork) -> float:
        """One all-reduce a layer, of a row for each token: what one card sends is nearly twice its share of all."""
        if self.num_cards == 1:
            return 0.0
        row_bytes = work.num_tokens * self.model.hidden_size * self.model.bytes_per_value
        sent_bytes = 2 * row_bytes * (self.num_cards - 1) / self.num_cards
        return self.model.num_layers * (self.card.link.latency_s + sent_bytes / self.card.link.bytes_per_s)
