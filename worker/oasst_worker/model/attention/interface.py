"""What the model asks of a way to attend."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.inputs import StepInputs

__all__ = ["Attend", "Attention", "rotary_table"]

# One layer of one step. From `qkv` [rows, 3 * hidden] and the layer's cache to [rows, hidden]: queries and keys are
# rotated, keys and values stand in the cache, and every row has attended to the positions up to its own. `qkv` may be
# overwritten.
Attend = Callable[[Tensor, Tensor], Tensor]


class Attention(Protocol):
    """A way to attend, with the layout of the KV cache that it needs."""

    @property
    def is_position_exact(self) -> bool:
        """A row's bits depend on its own positions alone, be it a prompt's or generated, in any chunk."""
        ...

    def make_cache(self, num_blocks: int) -> Tensor:
        """A cache of all layers, one at each index. Not initialised: no position is read before it was written."""
        ...

    def prepare(self, inputs: StepInputs) -> Attend:
        """What every layer of this step calls."""
        ...


def rotary_table(config: NeoXConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, [max_positions, rotary_dim] each, fp32."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device) / config.rotary_dim
    frequencies = 1.0 / (config.rotary_base**exponents)
    positions = torch.arange(config.max_positions, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()
