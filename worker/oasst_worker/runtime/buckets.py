"""Steps that only decode, in a few fixed sizes: what a size launches is recorded once and replayed.

    sequences      1   2   3   4   5  ...   8   9  ...  16  ...
    bucket         1   2   4   4   8  ...   8  16  ...  16  ...

A bucket owns the memory that its launches read and write, so a CUDA graph of them can be replayed for any sequences:
launching a graph costs a GPU's host one call for some four hundred. Rows behind the sequences are padding, which reads
and writes a block of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oasst_worker.engine import Batch, Chunk, GenerationParams
from oasst_worker.engine import Sequence as EngineSequence
from oasst_worker.model.inputs import BLOCK_SIZE, DecodeInputs
from oasst_worker.model.neox import KVCache, NeoX
from oasst_worker.runtime.tensors import make_inputs

__all__ = ["CudaGraphs", "DecodeBuckets", "Record", "record_nothing"]

# From a function that launches work on a device to one that launches the same work on the same memory and returns the
# same tensor. The caller keeps the function alive, and with it that memory, for as long as it replays the recording.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]

# A recording is tried on a sequence as long as this, which several programs attend to.
_TRIED_POSITIONS = 150
# Its logits may be so far from those of the plain launches, as a part of what logits differ among each other: products
# of more rows round otherwise, in bf16 by a hundredth.
_TOLERANCE = 0.05


def record_nothing(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return compute


class CudaGraphs:
    """Records CUDA graphs; they share the memory of what they compute in between, so one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Libraries have a workspace for each stream that they are called on.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Before the recording kernels are compiled and libraries take their workspaces, on the stream that is recorded.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outcome = compute()

        def replay() -> Tensor:
            graph.replay()
            return outcome

        return replay


class DecodeBuckets:
    """The buckets of a model and its cache, each made when it is first needed."""

    def __init__(
        self, model: NeoX, cache: KVCache, *, padding_block: int, max_sequences: int, record: Record | None = None
    ) -> None:
        """`padding_block` of the cache is no sequence's. `record` is by default what suits the model's device."""
        self._model = model
        self._cache = cache
        self._padding_block = padding_block
        self._sizes = [1 << power for power in range((max_sequences - 1).bit_length() + 1)]
        is_on_gpu = model.device.type == "cuda"
        self._record = record or (CudaGraphs(model.device) if is_on_gpu else record_nothing)
        self._buckets: dict[int, _Bucket] = {}

    def make_all(self) -> None:
        """No later step has to make one. The largest comes first: the memory it takes does for the others.

        The cache must be idle.

        Raises:
            RuntimeError: if a bucket does not compute what the model computes without it.
        """
        for size in reversed(self._sizes):
            self._bucket(size)
        self._try_all()

    def logits(self, batch: Batch, token_ids: Tensor | None = None) -> Tensor | None:
        """The logits of each chunk, [chunks, vocab] fp32, in memory that the next call writes to.

        `token_ids` are the chunks' own, [chunks] on the device, where the host does not know them yet; it must have
        waited for all calls but the last one.

        None for a batch that does anything else than decode, or has more sequences than the largest bucket.
        """
        num_rows = len(batch.chunks)
        if num_rows > self._sizes[-1] or not all(_fits(chunk) for chunk in batch.chunks):
            return None
        size = next(size for size in self._sizes if size >= num_rows)
        return self._bucket(size).compute(batch.chunks, token_ids)[:num_rows]

    def _try_all(self) -> None:
        """Every row of every bucket gives the logits that a sequence has without buckets."""
        config = self._model.config
        room = min(config.max_positions, self._padding_block * BLOCK_SIZE, _TRIED_POSITIONS)
        prompt = [position % config.vocab_size for position in range(room - 1)]
        sequence = EngineSequence("tried", prompt, GenerationParams(max_new_tokens=2), output_ids=[0])
        sequence.blocks += range(-(-room // BLOCK_SIZE))
        computed, chunk = Chunk(sequence, 0, len(prompt)), Chunk(sequence, len(prompt), room)
        for batch in (Batch((computed,)), Batch((chunk,))):
            expected = self._model.forward(make_inputs(batch, device=self._model.device), self._cache)
        for size in self._sizes:
            deviation = (self._bucket(size).compute([chunk] * size, None) - expected).square().mean().sqrt()
            if not deviation <= _TOLERANCE * expected.std():
                raise RuntimeError(f"steps of {size} sequences give other logits in a bucket, by {deviation:.2g}")

    def _bucket(self, size: int) -> "_Bucket":
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self._model, self._cache, size, self._padding_block, self._record)
        return self._buckets[size]


class _Bucket:
    """So many rows, in memory that stays where it is."""

    def __init__(self, model: NeoX, cache: KVCache, size: int, padding_block: int, record: Record) -> None:
        num_blocks = -(-model.config.max_positions // BLOCK_SIZE)
        # While the device still reads one page, the host fills the other.
        self._pages = [_Page(size, num_blocks, padding_block, model.device) for _ in range(2)]
        self._on_device = self._pages[0].numbers.to(model.device)
        (self._token_ids, positions, cells), block_table = _views(self._on_device, size)
        self._load((), None)
        inputs = DecodeInputs(self._token_ids, positions, cells, block_table)
        self._launches = model.prepare_decode(inputs, cache)  # Kept for its memory: see Record.
        self._compute = record(self._launches)

    def compute(self, chunks: Sequence[Chunk], token_ids: Tensor | None) -> Tensor:
        """Logits of all rows, those of the chunks first."""
        self._load(chunks, token_ids)
        return self._compute()

    def _load(self, chunks: Sequence[Chunk], token_ids: Tensor | None) -> None:
        self._pages.reverse()
        self._pages[0].fill(chunks)
        self._on_device.copy_(self._pages[0].numbers, non_blocking=True)
        if token_ids is not None:
            self._token_ids[: len(token_ids)].copy_(token_ids)


class _Page:
    """What a bucket's rows are, on the host: what goes to the device goes in one copy."""

    def __init__(self, size: int, num_blocks: int, padding_block: int, device: torch.device) -> None:
        self._padding = (0, 0, padding_block * BLOCK_SIZE)
        self._padding_blocks = [padding_block]
        # Token ids, positions, cells, then the block table.
        self.numbers = torch.zeros(size * (3 + num_blocks), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._rows, self._block_table = _views(self.numbers, size)
        self._blocks: list[Sequence[int]] = [()] * size  # As they stand in the table.

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """The rows are these, and padding."""
        num_padding = len(self._blocks) - len(chunks)
        rows = [_row_of(chunk) for chunk in chunks] + [self._padding] * num_padding
        self._rows.copy_(torch.tensor(rows).T)
        tables = [chunk.sequence.blocks for chunk in chunks] + [self._padding_blocks] * num_padding
        for row, blocks in enumerate(tables):
            if self._blocks[row] != blocks:  # Seldom: a sequence takes a block every sixteenth step.
                self._blocks[row] = list(blocks)
                self._block_table[row, : len(blocks)] = torch.tensor(blocks)


def _views(numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Token ids, positions and cells, [3, size], and the block table, [size, blocks]."""
    return numbers[: 3 * size].view(3, size), numbers[3 * size :].view(size, -1)


def _fits(chunk: Chunk) -> bool:
    """It is one generated token, and the next is drawn."""
    return chunk.decodes and chunk.draws and not chunk.drafts


def _row_of(chunk: Chunk) -> tuple[int, int, int]:
    """Token id, position and cell."""
    [token_id], (block, offset) = chunk.token_ids, divmod(chunk.start, BLOCK_SIZE)
    return token_id, chunk.start, chunk.sequence.blocks[block] * BLOCK_SIZE + offset
