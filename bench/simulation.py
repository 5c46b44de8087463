"""A discrete-event simulation of workers behind the queue: the real engine and scheduler, a clock instead of a model.

Steps last as long as a law says: the roofline of a card, or what was measured. The queue's policy is the one tenant's:
first come, first served. A worker claims what it has room for, in blocks of KV cache, as `oasst_worker.room` says.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from oasst_cli.plan.roofline import StepWork
from oasst_worker import engine
from oasst_worker.engine import Engine, EngineConfig, GenerationParams
from oasst_worker.engine.batch import Batch

from bench.executors import EmptyExecutor

__all__ = [
    "Arrival",
    "Chat",
    "Simulated",
    "StepLaw",
    "WorkerShape",
    "kv_tokens_expected",
    "poisson_arrivals",
    "simulate",
    "work_of",
]

StepLaw = Callable[[StepWork], float]

_BLOCK_SIZE = EmptyExecutor.block_size
# As oasst_worker.room has it.
_LOOKAHEAD_TOKENS = 64
_NEVER = -1


@dataclass(frozen=True)
class Arrival:
    """A request, and when it comes."""

    at_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def size(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass
class Chat:
    """What became of a request."""

    arrival: Arrival
    claimed_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0

    @property
    def time_to_first_token_s(self) -> float:
        return self.first_token_s - self.arrival.at_s

    @property
    def time_per_token_s(self) -> float:
        return (self.ended_s - self.first_token_s) / max(1, self.arrival.output_tokens - 1)


@dataclass(frozen=True)
class Simulated:
    """Every request, in the order of their ends, and what the workers did for them."""

    chats: list[Chat]
    num_steps: int
    stepping_s: float  # Over all workers.

    @property
    def mean_step_s(self) -> float:
        return self.stepping_s / self.num_steps


@dataclass(frozen=True)
class WorkerShape:
    """How much a worker holds, and how long its steps take."""

    law: StepLaw
    kv_tokens: int
    max_sequences: int = 64
    step_tokens: int = 512
    is_on_cpu: bool = False  # Which says how a prompt may be cut.


def poisson_arrivals(
    rate_per_s: float, seconds: float, *, prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], seed: int
) -> list[Arrival]:
    """Requests at this rate, of lengths drawn evenly from the given ranges."""
    chance = random.Random(seed)
    arrivals = []
    at_s = chance.expovariate(rate_per_s)
    while at_s < seconds:
        arrivals.append(Arrival(at_s, chance.randint(*prompt_tokens), chance.randint(*output_tokens)))
        at_s += chance.expovariate(rate_per_s)
    return arrivals


def simulate(arrivals: Sequence[Arrival], shape: WorkerShape, *, num_workers: int) -> Simulated:
    """Every request is served."""
    coming = deque(arrivals)
    waiting: deque[Arrival] = deque()
    ended: list[Chat] = []
    num_steps, stepping_s = 0, 0.0
    workers = [(0.0, number, _Worker(shape)) for number in range(num_workers)]
    while workers:
        now_s, number, worker = heapq.heappop(workers)
        while coming and coming[0].at_s <= now_s:
            waiting.append(coming.popleft())
        worker.claim(waiting, now_s)
        if worker.has_work():
            step_s = worker.step(now_s, ended)
            num_steps, stepping_s = num_steps + 1, stepping_s + step_s
            now_s += step_s
        elif coming:
            now_s = coming[0].at_s
        else:
            continue  # Nothing is left for it.
        heapq.heappush(workers, (now_s, number, worker))
    return Simulated(ended, num_steps, stepping_s)


def work_of(batch: Batch) -> StepWork:
    """What a step computes, in the roofline's terms."""
    chunks = batch.chunks
    return StepWork(
        num_tokens=batch.num_tokens,
        num_sequences=len(chunks),
        cached_tokens=sum(chunk.end for chunk in chunks),
        attended_tokens=sum(chunk.num_tokens * (chunk.start + 1 + chunk.end) / 2 for chunk in chunks),
    )


def kv_tokens_expected(prompt_tokens: int, output_tokens: int, *, max_new_tokens: int) -> int:
    """As `oasst_worker.generating.GeneratingJob.kv_tokens_expected`, of one choice: whole blocks, and one kept free."""
    num_tokens = prompt_tokens + min(output_tokens + _LOOKAHEAD_TOKENS, max_new_tokens)
    return (-(-num_tokens // _BLOCK_SIZE) + 1) * _BLOCK_SIZE


@dataclass
class _Worker:
    shape: WorkerShape
    _chats: dict[str, Chat] = field(default_factory=dict)
    _num_claimed: int = 0

    def __post_init__(self) -> None:
        shape = self.shape
        self._last_step_s = self._spent_s = 0.0
        executor = EmptyExecutor(shape.kv_tokens // _BLOCK_SIZE, spend=self._spend, is_on_cpu=shape.is_on_cpu)
        config = EngineConfig(
            eos_token_id=_NEVER,
            max_positions=shape.kv_tokens,
            max_sequences=shape.max_sequences,
            step_tokens=shape.step_tokens,
        )
        self._engine = Engine(executor, config, clock=lambda: self._spent_s)
        self._sequences: dict[str, engine.Sequence] = {}

    def _spend(self, batch: Batch) -> None:
        self._last_step_s = self.shape.law(work_of(batch))
        self._spent_s += self._last_step_s

    def has_work(self) -> bool:
        return self._engine.has_work()

    def claim(self, waiting: deque[Arrival], now_s: float) -> None:
        """Takes what there is room for, from the front."""
        while waiting and len(self._chats) < self.shape.max_sequences and self._fits(waiting[0]):
            arrival = waiting.popleft()
            self._num_claimed += 1
            sequence_id = str(self._num_claimed)
            # No two prompts begin alike: nothing of one is used again for another.
            prompt = [self._num_claimed] * arrival.prompt_tokens
            sequence = engine.Sequence(sequence_id, prompt, GenerationParams(arrival.output_tokens))
            self._chats[sequence_id] = Chat(arrival, claimed_s=now_s)
            self._sequences[sequence_id] = sequence
            self._engine.add(sequence)

    def _fits(self, arrival: Arrival) -> bool:
        if not self._chats:
            return True
        held = sum(
            kv_tokens_expected(
                sequence.num_prompt_tokens, sequence.num_output_tokens, max_new_tokens=sequence.params.max_new_tokens
            )
            for sequence in self._sequences.values()
        )
        # The last block may be all but empty, and another is kept free.
        return arrival.size + 2 * _BLOCK_SIZE <= self.shape.kv_tokens - held

    def step(self, now_s: float, ended: list[Chat]) -> float:
        """One step of the engine; how long it took."""
        outputs = self._engine.step()
        step_s = self._last_step_s
        ended_s = now_s + step_s
        for output in outputs:
            chat = self._chats[output.sequence_id]
            chat.first_token_s = chat.first_token_s or ended_s
            if output.finish is not None:
                chat.ended_s = ended_s
                ended.append(chat)
                del self._chats[output.sequence_id], self._sequences[output.sequence_id]
        return step_s
