"""Decides what each step computes.

One rule: a sequence has tokens computed and tokens to compute, and a step hands out a budget of tokens so that the
first catch up with the second. Decoding is a gap of one, prefill a large one, a preempted sequence one that starts
from zero again.
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import count
from operator import attrgetter

from oasst_worker.engine.batch import Batch, Chunk
from oasst_worker.engine.blocks import BlockPool
from oasst_worker.engine.limits import StepLimits, check_budget
from oasst_worker.engine.pace import StepCost
from oasst_worker.engine.scoring import ScoringSequence
from oasst_worker.engine.sequence import Sequence
from oasst_worker.engine.speculation import Speculator

__all__ = ["Scheduler"]

# More prompts than this, and than this share of those that decode, are a burst: it goes through at full budget, for
# many are kept waiting.
_FEW_PROMPTS = 2
_FEW_PROMPTS_SHARE = 1 / 4

# Of the steps beside which prompts are paced, one in so many goes without them: what it takes is what pace is set by.
_STEPS_PER_PROBE = 16


@dataclass(frozen=True, slots=True)
class _Lane:
    """Sequences of equal right, by their arrival."""

    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    # Key -> the running sequence that is to compute the block first.
    expected: dict[bytes, Sequence] = field(default_factory=dict)


class Scheduler:
    """Owns the sequences that wait and run, and the blocks they hold.

    - Sequences that decode come first. What is left of the budget goes to prompts, oldest first, in chunks.
    - While some decode, a few prompts get no more than makes a step `max_slowdown` times as long, by what steps were
      seen to cost.
    - A sequence is admitted when a slot is free and all its tokens fit into free blocks, and a block for each that runs
      stays free. What the blocks of others know of its beginning it does not compute again; what others are about to
      compute it waits for.
    - When a running sequence needs a block and none is free, a younger one gives all its blocks back and is computed
      again later: the one that has the least to compute again. It keeps its place by arrival. None that generates is
      preempted for a younger one, so the oldest always ends, and then the next.
    - When the device had no memory for a batch, the younger half waits in the same way, and steps are smaller for a
      while.
    - What is to be scored comes behind all that: it takes no slot, waits for nobody's block but its own kind's, and is
      preempted first. Beside sequences that generate it makes a step no longer than that either.
    - While all that run decode and nobody waits, the next step is known before this one has ended.
    - Where a step is small, what sequences that decode may say next is guessed and computed with it, if there are
      blocks to spare.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        step_tokens: int,
        prefill_tile: int,
        is_position_exact: bool,
        max_slowdown: float = 1.7,
        speculate: int = 0,
    ) -> None:
        """
        Raises:
            StepBudgetError: as `check_budget`.
        """
        check_budget(max_sequences=max_sequences, step_tokens=step_tokens, prefill_tile=prefill_tile)
        self.max_sequences = max_sequences
        self.num_preemptions = 0
        # Prompt tokens of all sequences that ever ran, and those among them that were there already.
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.cost = StepCost()
        self.speculator = Speculator(speculate, self.cost)
        self._max_slowdown = max_slowdown
        self._num_paced = 0
        self._speculates = speculate > 0
        self._pool = pool
        self._limits = StepLimits(max_sequences=max_sequences, step_tokens=step_tokens, prefill_tile=prefill_tile)
        self._prefill_tile = prefill_tile
        self._is_position_exact = is_position_exact
        self._generating = _Lane()
        self._scoring = _Lane()
        self._arrivals = count()

    @property
    def num_waiting(self) -> int:
        return len(self._generating.waiting) + len(self._scoring.waiting)

    @property
    def num_running(self) -> int:
        return len(self._generating.running) + len(self._scoring.running)

    @property
    def kv_tokens_total(self) -> int:
        return self._pool.num_blocks * self._pool.block_size

    @property
    def kv_tokens_used(self) -> int:
        return (self._pool.num_blocks - self._pool.num_free) * self._pool.block_size

    @property
    def _youngest(self) -> Sequence:
        """The first to be preempted."""
        return (self._scoring.running or self._generating.running)[-1]

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = next(self._arrivals)
        self._lane_of(sequence).waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence neither runs nor waits, and its blocks are free."""
        lane = self._lane_of(sequence)
        if sequence in lane.running:
            self._stop(sequence)
        else:
            lane.waiting.remove(sequence)
        self.speculator.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Nothing of the sequence is used again by others."""
        self._pool.forget(sequence.blocks)

    def schedule(self) -> Batch:
        """The next step's work; empty if there is none."""
        chunks: dict[Sequence, Chunk] = {}
        generating, scoring = self._generating.running, self._scoring.running
        decoding = [sequence for sequence in generating if sequence.num_to_compute == 1]
        budget = self._give_chunks(decoding, self._limits.step_tokens, chunks)
        prefilling = [sequence for sequence in generating if sequence.num_to_compute > 1]
        paced = self._paced(budget, num_decoding=len(chunks))
        if not self._is_burst(len(decoding)):
            budget = paced
        budget = self._give_chunks(prefilling, budget, chunks)
        budget, has_room = self._admit(self._generating, budget, chunks)
        budget = min(budget, paced)
        budget = self._give_chunks(list(scoring), budget, chunks)
        if has_room:  # Else the blocks are for those that generate.
            self._admit(self._scoring, budget, chunks)
        if self._speculates:
            self._speculate(chunks)
        return Batch(tuple(chunks.values()))

    def schedule_behind(self, batch: Batch) -> Batch:
        """The step behind one whose tokens are not there yet: all go on, but for those that draw their last now.

        Empty where that step could not be the one `schedule` would give: while somebody waits or has a prompt to
        compute, where a draw counts the tokens before it, and where a sequence would have to be preempted.
        """
        running = self._generating.running
        drawing = {chunk.sequence for chunk in batch.chunks if chunk.num_draws == 1 and _ends_its_sequence(chunk)}
        if self.num_waiting or self._scoring.running or self._speculates or not drawing.issuperset(running):
            return Batch(())
        going_on = [each for each in running if each.num_output_tokens + 1 < each.params.max_new_tokens]
        if any(each.params.counts_tokens for each in going_on):
            return Batch(())
        if not all(self._grow_to_spare(each, each.num_tokens + 1) for each in going_on):
            return Batch(())
        return Batch(tuple(Chunk(each, each.num_tokens, each.num_tokens + 1) for each in going_on))

    def shrink(self, failed: Batch) -> bool:
        """The next batch is half as large as this one, for which there was no memory; the youngest wait for theirs.

        Returns False if it could not be smaller.
        """
        if not self._limits.shrink(failed):
            return False
        while self.num_running > self._limits.max_sequences:
            self._preempt(self._youngest)
        return True

    def record_seconds(self, batch: Batch, seconds: float) -> None:
        """The batch took so long."""
        num_decoding = sum(chunk.num_tokens for chunk in batch.chunks if chunk.decodes)
        self.cost.record(seconds, decoding=num_decoding, prompts=batch.num_tokens - num_decoding)

    def record_good_step(self) -> None:
        """The device had memory for the batch."""
        self._limits.record_good_step()

    def record_computed(self, chunk: Chunk, *, num_accepted: int = 0) -> None:
        """The chunk's keys and values are in the cache, for whoever begins alike, as are those of the drafts that were
        accepted: they stand in the sequence by now.
        """
        sequence, block_size = chunk.sequence, self._pool.block_size
        sequence.num_computed = chunk.end + num_accepted
        blocks = range(chunk.start // block_size, self._num_reusable(sequence, sequence.num_computed) // block_size)
        if blocks:
            keys = sequence.keys(block_size)
            for index in blocks:
                self._pool.publish(sequence.blocks[index], keys[index])
                self._lane_of(sequence).expected.pop(keys[index], None)
        if chunk.drafts:
            self.speculator.record(sequence, num_drafted=len(chunk.drafts), num_accepted=num_accepted)

    def _num_reusable(self, sequence: Sequence, num_tokens: int) -> int:
        """Of its first tokens, those whose keys and values are the same in every sequence that begins alike."""
        if self._is_position_exact:
            return num_tokens
        num_tokens = min(num_tokens, sequence.num_prompt_tokens)
        return num_tokens - num_tokens % self._prefill_tile

    def _lane_of(self, sequence: Sequence) -> _Lane:
        return self._scoring if isinstance(sequence, ScoringSequence) else self._generating

    def _is_burst(self, num_decoding: int) -> bool:
        """More prompts come in than a few beside so many that decode."""
        slots = self._limits.max_sequences - len(self._generating.running)
        num_prefilling = len(self._generating.running) - num_decoding
        num_prompts = num_prefilling + min(slots, len(self._generating.waiting))
        return num_prompts > max(_FEW_PROMPTS, _FEW_PROMPTS_SHARE * num_decoding)

    def _paced(self, budget: int, *, num_decoding: int) -> int:
        """What of the budget prompts may get beside what decodes: tiles, one at least; all if nothing does."""
        if not num_decoding:
            return budget
        self._num_paced += 1
        if self._num_paced % _STEPS_PER_PROBE == 0:
            return 0
        tiles = round(self.cost.prompt_rows_within(self._max_slowdown, beside=num_decoding) / self._prefill_tile)
        return min(budget, max(tiles, 1) * self._prefill_tile)

    def _give_chunks(self, sequences: Items[Sequence], budget: int, chunks: dict[Sequence, Chunk]) -> int:
        """Chunks for these sequences of one lane that run; returns what is left of the budget."""
        for sequence in sequences:
            if sequence in self._lane_of(sequence).running:  # Not preempted meanwhile.
                budget -= self._give_chunk(sequence, budget, chunks)
        return budget

    def _admit(self, lane: _Lane, budget: int, chunks: dict[Sequence, Chunk]) -> tuple[int, bool]:
        """Starts what waits in a lane; returns what is left of the budget, and whether nothing waits for blocks."""
        for sequence in list(lane.waiting):
            if budget < self._prefill_tile or not self._has_slot(lane):
                break
            known, unknown_keys = self._look_up(sequence)
            if unknown_keys and unknown_keys[0] in lane.expected:
                continue  # Known in a step or a few; the next in line need not wait for that.
            if not self._fits(sequence, known):
                if lane is self._scoring or not self._make_room(sequence):
                    return budget, False
                known, unknown_keys = self._look_up(sequence)
            self._start(sequence, known, unknown_keys)
            budget -= self._give_chunk(sequence, budget, chunks)
        return budget, True

    def _has_slot(self, lane: _Lane) -> bool:
        return lane is self._scoring or len(lane.running) < self._limits.max_sequences

    def _look_up(self, sequence: Sequence) -> tuple[list[int], Items[bytes]]:
        """The known blocks of its beginning that it may use again, and the keys of those behind them."""
        block_size = self._pool.block_size
        keys = sequence.keys(block_size)[: self._num_reusable(sequence, sequence.num_reusable) // block_size]
        known = self._pool.find(keys)
        known = known[: self._num_reusable(sequence, len(known) * block_size) // block_size]
        return known, keys[len(known) :]

    def _fits(self, sequence: Sequence, known: Items[int]) -> bool:
        """There are blocks for all its tokens beyond the known ones, and one more for each that runs.

        Without that, what is admitted now would be preempted for the next block that somebody needs.
        """
        missing = self._pool.blocks_for(sequence.num_tokens) - len(known)
        return missing + self.num_running <= self._pool.num_free - self._pool.num_free_among(known)

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether the sequence fits once so many of those that are scored are preempted as it takes."""
        while self._scoring.running:
            self._preempt(self._scoring.running[-1])
            known, _ = self._look_up(sequence)
            if self._fits(sequence, known):
                return True
        return False

    def _start(self, sequence: Sequence, known: Items[int], unknown_keys: Items[bytes]) -> None:
        """The sequence runs, and has computed what is known already."""
        lane = self._lane_of(sequence)
        lane.waiting.remove(sequence)
        insort(lane.running, sequence, key=attrgetter("arrival"))
        self._pool.share(sequence.blocks, known)
        sequence.num_computed = len(known) * self._pool.block_size
        for key in unknown_keys:
            lane.expected.setdefault(key, sequence)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_tokens += sequence.num_cached_tokens

    def _stop(self, sequence: Sequence) -> None:
        """The sequence does not run, and its blocks are free."""
        lane = self._lane_of(sequence)
        lane.running.remove(sequence)
        self._pool.release(sequence.blocks, is_worth_less=lane is self._scoring)
        for key in [key for key, owner in lane.expected.items() if owner is sequence]:
            del lane.expected[key]

    def _give_chunk(self, sequence: Sequence, budget: int, chunks: dict[Sequence, Chunk]) -> int:
        """Enters the sequence's chunk, if budget and blocks allow one; returns how many tokens it takes."""
        end = self._chunk_end(sequence, budget)
        if end <= sequence.num_computed:
            return 0
        freed = 0
        while not self._pool.grow(sequence.blocks, end):
            victim = self._victim_for(sequence)
            self._preempt(victim)
            withdrawn = chunks.pop(victim, None)
            freed += withdrawn.num_tokens if withdrawn else 0
            if victim is sequence:
                return -freed
        chunks[sequence] = Chunk(sequence, sequence.num_computed, end)
        return end - sequence.num_computed - freed

    def _speculate(self, chunks: dict[Sequence, Chunk]) -> None:
        """Chunks that decode get drafts, oldest first, as far as these are worth their rows."""
        num_rows = sum(chunk.num_tokens for chunk in chunks.values())
        for sequence, chunk in chunks.items():
            if not (chunk.decodes and chunk.draws):
                continue
            drafts = self.speculator.draft(sequence, num_rows=num_rows)[: self._limits.step_tokens - num_rows]
            if drafts and self._grow_to_spare(sequence, chunk.end + len(drafts)):
                chunks[sequence] = replace(chunk, drafts=drafts)
                num_rows += len(drafts)

    def _grow_to_spare(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for so many tokens, as long as a block for each that runs stays free: a guess preempts nobody."""
        missing = self._pool.blocks_for(num_tokens) - len(sequence.blocks)
        if missing > 0 and missing + self.num_running > self._pool.num_free:
            return False
        return self._pool.grow(sequence.blocks, num_tokens)

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        end = min(sequence.num_tokens, sequence.num_computed + budget)
        if end < sequence.num_prompt_tokens:
            end -= end % self._prefill_tile
        return end

    def _victim_for(self, sequence: Sequence) -> Sequence:
        """Who gives its blocks back so that the sequence gets one: itself, if none is below it.

        Blocks that others hold too are not freed. Of those that free some, the one with the fewest tokens loses least.
        """
        if self._scoring.running:
            return self._scoring.running[-1]
        younger = [
            other
            for other in self._generating.running
            if other.arrival > sequence.arrival and self._pool.num_held_once(other.blocks)
        ]
        return min(younger, key=lambda other: (other.num_computed, -other.arrival), default=sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.num_computed = 0
        insort(self._lane_of(sequence).waiting, sequence, key=attrgetter("arrival"))
        self.num_preemptions += 1


def _ends_its_sequence(chunk: Chunk) -> bool:
    return chunk.end == chunk.sequence.num_tokens
