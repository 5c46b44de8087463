"""The engine's own thread: step after step, tokens to text, reports to whoever takes them."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from oasst_jobs import failpoints

from oasst_worker.engine import Engine, ScoreOutput, TokenOutput
from oasst_worker.parts import Part, PartError, PartOutput

__all__ = ["EngineLoad", "EngineLoop", "EngineStalledError", "StepReport", "StepWatchdog"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How full the engine is."""

    num_running: int = 0
    num_waiting: int = 0
    kv_tokens_used: int = 0
    # Since the start:
    num_preemptions: int = 0
    num_prompt_tokens: int = 0  # Of sequences that ran.
    num_cached_tokens: int = 0  # Those of them that were in the KV cache already.
    num_out_of_memory: int = 0  # Steps for which the device had no memory at first.
    num_drafted_tokens: int = 0  # Guessed ahead.
    num_accepted_tokens: int = 0  # Those of them that were right.


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one turn of the loop gave, and what it took."""

    outputs: tuple[PartOutput, ...]
    ended_s: float  # By the loop's clock.
    step_s: float = 0.0
    num_sequences: int = 0  # In the batch; 0 if no step was taken.
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_drawn_tokens: int = 0
    is_urgent: bool = False  # Holds the first or the last output of a part.


class EngineLoop:
    """Runs an engine in a thread of its own; nobody else touches the engine.

    Others hand in parts of jobs, take reports, and are told by a callback when there are some. The loop runs ahead of
    them by at most `max_steps_ahead` reports, then waits: so a queue that cannot be reached holds the engine back
    without losing a token, and memory stays bounded.

        start -> ( wait for commands or room -> apply commands -> step -> report )* -> stop
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_steps_ahead: int = 32,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_sequences = engine.max_sequences
        self.kv_tokens_total = engine.kv_tokens_total
        self.block_size = engine.block_size
        # Done when the thread has ended: with the exception that ended it, or with None after `stop`.
        self.ended: Future[None] = Future()
        self.load = EngineLoad()  # As of the last turn.
        self._engine = engine
        self._max_steps_ahead = max_steps_ahead
        self._on_report: Callable[[], object] = lambda: None
        self._quiet_s = 0.0
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # This thread's own: sequence id -> what the engine holds; and the ids of those that gave no output yet.
        self._parts: dict[str, Part] = {}
        self._silent: set[str] = set()
        self._num_steps = 0
        self._step_in_progress: int | None = None
        # Guarded by `_changed`, which is notified whenever one of them changes.
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._reports: deque[StepReport] = deque()
        self._taken_s = float("-inf")  # When some were taken last.
        self._is_told = False  # The callback was called since.
        self._stopping = False

    @property
    def step_in_progress(self) -> int | None:
        """The number of the step that is being computed now."""
        return self._step_in_progress

    def start(self, on_report: Callable[[], object], *, quiet_s: float = 0.0) -> None:
        """Turns begin. The engine's thread calls `on_report` once when there are reports to take.

        Whoever took some comes back after `quiet_s` by itself. Until then it is called only for urgent reports, or when
        the loop has come half as far ahead as it may.
        """
        self._on_report = on_report
        self._quiet_s = quiet_s
        self.ended.set_running_or_notify_cancel()
        self._thread.start()

    def stop(self) -> None:
        """No step is begun any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread's end; False if it is still in a step by then. A loop never started has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def add(self, part: Part) -> None:
        """The part runs from the next turn on. If the engine cannot take it, a report tells its error."""
        self._command(lambda: self._admit(part))

    def remove(self, part: Part) -> None:
        """The part is gone from the next turn on. Reports made before may still hold outputs of it."""
        self._command(lambda: self._evict(part))

    def take(self) -> list[StepReport]:
        """All reports made since the last call, oldest first."""
        with self._changed:
            reports = list(self._reports)
            self._reports.clear()
            self._is_told = False
            if reports:
                self._taken_s = self._clock()
            self._changed.notify()
        return reports

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._turn_until_stopped()
        except BaseException as error:
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _turn_until_stopped(self) -> None:
        while (commands := self._next_commands()) is not None:
            for command in commands:
                command()
            report = self._step() if self._can_step() else None
            self.load = self._measure_load()
            if report is not None:
                self._report(report)

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """Waits until there is something to do; None when that is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._commands or self._can_step())
            if self._stopping:
                return None
            commands, self._commands = self._commands, []
            return commands

    def _can_step(self) -> bool:
        return self._engine.has_work() and len(self._reports) < self._max_steps_ahead

    def _report(self, report: StepReport) -> None:
        with self._changed:
            self._reports.append(report)
            is_far_ahead = 2 * len(self._reports) >= self._max_steps_ahead
            is_due = report.is_urgent or is_far_ahead or report.ended_s - self._taken_s >= self._quiet_s
            tells = is_due and not self._is_told  # Whoever was told of an earlier one will find this one beside it.
            self._is_told = self._is_told or tells
        if tells:
            self._on_report()

    def _admit(self, part: Part) -> None:
        try:
            self._engine.add(part.sequence)
        except ValueError as error:
            refused = part.fail(PartError("INTERNAL", str(error)))
            self._report(StepReport((refused,), ended_s=self._clock(), is_urgent=True))
        else:
            self._parts[part.sequence.sequence_id] = part
            self._silent.add(part.sequence.sequence_id)

    def _evict(self, part: Part) -> None:
        sequence_id = part.sequence.sequence_id
        if self._parts.get(sequence_id) is part:
            del self._parts[sequence_id]
            self._silent.discard(sequence_id)
            self._engine.remove(sequence_id)

    def _step(self) -> StepReport:
        self._num_steps += 1
        self._step_in_progress = self._num_steps
        started_s = self._clock()
        failpoints.reach("worker.stepping")
        outputs = self._engine.step()
        ended_s = self._clock()
        self._step_in_progress = None
        batch = self._engine.last_batch
        num_decode_tokens = sum(chunk.decodes for chunk in batch.chunks)
        num_drafted_tokens = sum(len(chunk.drafts) for chunk in batch.chunks)
        num_silent = len(self._silent)
        read = tuple(self._read(outputs))
        return StepReport(
            outputs=read,
            ended_s=ended_s,
            step_s=ended_s - started_s,
            num_sequences=len(batch.chunks),
            num_prefill_tokens=batch.num_tokens - num_decode_tokens - num_drafted_tokens,
            num_decode_tokens=num_decode_tokens,
            num_drawn_tokens=sum(isinstance(each, TokenOutput) and each.token_id is not None for each in outputs),
            is_urgent=len(self._silent) < num_silent or any(output.has_ended for output in read),
        )

    def _read(self, outputs: Iterable[TokenOutput | ScoreOutput]) -> Iterator[PartOutput]:
        """The outputs as their jobs are to see them, none behind the end of its part."""
        for output in outputs:
            part = self._parts.get(output.sequence_id)
            if part is not None:
                yield self._read_one(part, output)

    def _read_one(self, part: Part, output: TokenOutput | ScoreOutput) -> PartOutput:
        """The output as its job is to see it. A part that ended here, by its text or by an error, leaves the engine."""
        try:
            read = part.take(output)
        except Exception:  # One part's text must not end the others'.
            logger.exception("reading an output failed sequence_id=%s", output.sequence_id)
            read = part.fail(PartError("INTERNAL", "what was computed could not be read"))
        self._silent.discard(output.sequence_id)
        if read.has_ended:
            self._evict(part)
        return read

    def _measure_load(self) -> EngineLoad:
        engine = self._engine
        return EngineLoad(
            engine.num_running,
            engine.num_waiting,
            engine.kv_tokens_used,
            engine.num_preemptions,
            engine.num_prompt_tokens,
            engine.num_cached_tokens,
            engine.num_out_of_memory,
            engine.num_drafted_tokens,
            engine.num_accepted_tokens,
        )


class EngineStalledError(RuntimeError):
    """A step took longer than any step should."""


class StepWatchdog:
    """Notices a step that does not end.

    The limit is `floor_s` or ten times the 99th percentile of recent steps, the larger. Time counts as observed here,
    at most `max_gap_s` from one observation to the next: a process that was stopped and goes on has not stalled.
    """

    _FACTOR = 10
    _NUM_RECENT_STEPS = 1000

    def __init__(self, *, floor_s: float, max_gap_s: float = 2.0) -> None:
        self._floor_s = floor_s
        self._max_gap_s = max_gap_s
        self._recent_s: deque[float] = deque(maxlen=self._NUM_RECENT_STEPS)
        self._step: int | None = None
        self._stuck_s = 0.0
        self._observed_at: float | None = None

    @property
    def stuck_s(self) -> float:
        """How long the step in progress has been seen in progress."""
        return self._stuck_s

    @property
    def limit_s(self) -> float:
        """How long a step may take now."""
        if not self._recent_s:
            return self._floor_s
        slow_s = sorted(self._recent_s)[len(self._recent_s) * 99 // 100]
        return max(self._floor_s, self._FACTOR * slow_s)

    def record(self, step_s: float) -> None:
        """A step ended and took this long."""
        self._recent_s.append(step_s)

    def observe(self, step: int | None, now_s: float) -> None:
        """Looks at the number of the step in progress.

        Raises:
            EngineStalledError: if that step has been in progress for longer than the limit.
        """
        gap_s = 0.0 if self._observed_at is None else min(now_s - self._observed_at, self._max_gap_s)
        self._observed_at = now_s
        self._stuck_s = self._stuck_s + gap_s if step is not None and step == self._step else 0.0
        self._step = step
        if self._stuck_s > self.limit_s:
            raise EngineStalledError(
                f"step {step} has not ended after {self._stuck_s:.1f} s; {self.limit_s:.1f} s is the limit,"
                " and --step-limit-s sets the least it can be"
            )
