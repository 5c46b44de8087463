"""Executes the engine's batches on one device."""

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from itertools import islice

from torch import Tensor

from oasst_worker.engine import (
    Batch,
    Chunk,
    Computed,
    Launched,
    Sample,
    Scores,
)
from oasst_worker.model.attention import PREFILL_TILE
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.kernels import QUERIES
from oasst_worker.model.neox import NeoX
from oasst_worker.model.sampler import Draw, Sampler, SamplingRow, uniform_for
from oasst_worker.runtime.buckets import DecodeBuckets
from oasst_worker.runtime.launched import DrawnBatch, GivenTokens, UndrawnBatch, as_samples, within_memory
from oasst_worker.runtime.ranks import RankProcesses, SplitModel
from oasst_worker.runtime.scoring import BatchTargets, find_targets, score_batch
from oasst_worker.runtime.tensors import make_inputs

__all__ = ["ModelRunner"]

_log = logging.getLogger(__name__)


class ModelRunner:
    """A model, its KV cache and its sampler: an `oasst_worker.engine.Executor`.

    The cache is not initialised, and on a CPU the system hands out its pages only when they are written.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        model: NeoX | SplitModel,
        *,
        num_blocks: int,
        banned_token_ids: Iterable[int] = (),
        max_decoding: int = 0,
        looks_ahead: bool | None = None,
    ) -> None:
        """`banned_token_ids` are never drawn: padding rows of the vocabulary, control tokens other than end-of-text.

        Steps of up to `max_decoding` sequences that only decode run in buckets, where the model can. By default the
        next one is launched ahead where a device computes by itself.
        """
        config = model.config
        self.num_blocks = num_blocks
        self.model = model
        self._sampler = Sampler(config.vocab_size, banned_token_ids, model.device)
        self._buckets: DecodeBuckets | None = None
        if max_decoding and isinstance(model, NeoX) and model.can_decode:
            self.cache = model.make_cache(num_blocks + 1)
            self._buckets = DecodeBuckets(model, self.cache, padding_block=num_blocks, max_sequences=max_decoding)
        else:
            self.cache = model.make_cache(num_blocks)
        self.is_position_exact = model.is_position_exact
        # Where a position's bits depend on itself alone a prompt may be cut anywhere; so many rows share loads.
        self.prefill_tile = QUERIES if model.is_position_exact else PREFILL_TILE
        self.device = model.device
        is_one_gpu = isinstance(model, NeoX) and model.is_on_one_device and model.device.type == "cuda"
        self.looks_ahead = is_one_gpu if looks_ahead is None else looks_ahead

    def make_buckets(self) -> None:
        """Every bucket is there before it is needed; none, if the device cannot record what they launch."""
        try:
            if self._buckets:
                self._buckets.make_all()
        except Exception as error:  # Triton, the compilers it starts and the driver each raise their own.
            _log.warning("steps that decode are launched kernel by kernel: %s", error)
            self._buckets = None

    @property
    def is_row_exact(self) -> bool:
        """No sequence's bits depend on the rows beside its own."""
        return self.model.is_row_exact

    @property
    def ranks(self) -> RankProcesses | None:
        """The other processes that compute the model, if it is split."""
        return self.model.processes if isinstance(self.model, SplitModel) else None

    def execute(self, batch: Batch) -> Items[Sample | Scores]:
        """Keys and values of every chunk are in the cache.

        Returns, in order, the samples of each chunk that draws and scores for each that has targets.

        Raises:
            OutOfDeviceMemoryError: if the device has no memory left for the batch.
        """
        return [result for result in self.launch(batch).wait() if result is not None]

    def launch(self, batch: Batch) -> Launched:
        """As `execute`, without waiting for the device."""
        return within_memory(lambda: self._launch(batch))

    def launch_behind(self, batch: Batch, before: Launched) -> Launched:
        """As `launch`, each chunk being the token that the batch before draws for its sequence.

        Raises:
            TypeError: if the batch before draws nothing, or another runner launched it.
            OutOfDeviceMemoryError: as `execute`.
        """
        if not isinstance(before, DrawnBatch):
            raise TypeError(f"no batch can follow a {type(before).__name__}")
        return within_memory(lambda: self._launch(batch, before.given_to(batch)))

    def _launch(self, batch: Batch, given: GivenTokens | None = None) -> Launched:
        targets = find_targets(batch)
        if targets.rows:
            return Computed(self._compute_scoring(batch, targets))
        drawn_ids = given.token_ids if given else None
        logits = self._buckets.logits(batch, drawn_ids) if self._buckets else None
        if logits is None:
            logits = self._forward(batch, drawn_ids)
        elif self.looks_ahead:  # The next batch writes there, and a row may have to be looked at again.
            logits = logits.clone()
        draw = self._draw(batch, logits, drawn_ids)
        return DrawnBatch(batch, draw, given) if draw else UndrawnBatch(logits)

    def _compute_scoring(self, batch: Batch, targets: BatchTargets) -> Items[Sample | Scores]:
        """As `execute`; logits of all targets at once would take too much memory, so those that draw come first."""
        inputs = make_inputs(batch, device=self.model.device)
        hidden = self.model.hidden(inputs, self.cache)
        draws = any(chunk.draws for chunk in batch.chunks)
        draw = self._draw(batch, self.model.logits(hidden[inputs.drawing_rows])) if draws else None
        samples = iter(as_samples(draw.wait()) if draw else ())
        scores = iter(score_batch(targets, hidden, self.model.logits))
        results: list[Sample | Scores] = []
        for chunk in batch.chunks:
            if chunk.draws:
                results += islice(samples, chunk.num_draws)
            elif chunk.targets:
                results.append(next(scores))
        return results

    def _draw(self, batch: Batch, logits: Tensor, last_ids: Tensor | None = None) -> Draw | None:
        rows = [row for chunk in batch.chunks if chunk.draws for row in self._sampling_rows(chunk)]
        return self._sampler.launch(logits, rows, last_ids) if rows else None

    def _forward(self, batch: Batch, drawn_ids: Tensor | None = None) -> Tensor:
        inputs = make_inputs(batch, device=self.model.device, drawn_ids=drawn_ids)
        return self.model.forward(inputs, self.cache)

    def _sampling_rows(self, chunk: Chunk) -> Iterator[SamplingRow]:
        """Of the chunk's last token, and of each draft as if those before it had been drawn."""
        sequence, params = chunk.sequence, chunk.sequence.params
        for num_drafts in range(chunk.num_draws):
            drafts = chunk.drafts[:num_drafts]
            position = chunk.end - sequence.num_prompt_tokens + num_drafts
            counts = sequence.output_counts
            may_end = position >= params.min_new_tokens
            yield SamplingRow(
                params,
                uniform_for(params.seed, params.choice, position) if params.temperature else 0.0,
                seen_ids=sequence.seen_ids + array("q", drafts) if drafts else sequence.seen_ids,
                output_counts=Counter(counts) + Counter(drafts) if drafts and params.counts_tokens else counts,
                banned_ids=() if may_end else (self.model.config.eos_token_id,),
            )
