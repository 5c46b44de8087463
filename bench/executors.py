"""An executor without a model, for whoever measures or simulates what is around it."""

from collections.abc import Callable

from oasst_worker.engine import Batch, Chunk, Sample
from oasst_worker.model.attention import PREFILL_TILE
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.kernels import QUERIES

__all__ = ["EmptyExecutor"]

_ANY_TOKEN = 7


class EmptyExecutor:
    """Computes nothing: a step takes as long as `spend` does, and each sequence draws what `draw` says.

    It has a model runner's blocks and tiles: those of a CPU, or of a GPU.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        num_blocks: int,
        *,
        spend: Callable[[Batch], None] = lambda _: None,
        draw: Callable[[Chunk], int] = lambda _: _ANY_TOKEN,
        is_on_cpu: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.prefill_tile = QUERIES if is_on_cpu else PREFILL_TILE
        self.is_position_exact = is_on_cpu
        self._spend = spend
        self._draw = draw

    def execute(self, batch: Batch) -> list[Sample]:
        self._spend(batch)
        return [Sample(self._draw(chunk)) for chunk in batch.chunks if chunk.draws]
