"""The values that go in and out of the queue."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

from oasst.jobs.v1 import job_pb2

__all__ = [
    "MAX_WEIGHT",
    "MIN_WEIGHT",
    "ClaimedJob",
    "DeadLetter",
    "Durability",
    "JobSnapshot",
    "JobState",
    "LogSnapshot",
    "PushItem",
    "PushStatus",
    "QueueLimits",
    "QueueLoad",
    "Submission",
    "Submitted",
    "SweepReport",
    "TenantPolicy",
]

MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0


class JobState(StrEnum):
    """Where a job is in its life.

    WAITING <-> RUNNING -> FINISHED | FAILED
    WAITING  |  RUNNING -> CANCELLED | EXPIRED
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can change the job any more."""
        return self not in (JobState.WAITING, JobState.RUNNING)


class Durability(StrEnum):
    """Where a job is kept by the time it counts as submitted."""

    # On the server that answered.
    LOCAL = "local"
    # On one of its replicas as well.
    REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What a gateway lets into the queue. One job alone may always wait, whatever its size.

    Once as much waits, a tenant that has less than its share of that by weight is let in all the same, up to twice the
    limit: so a tenant that fills the queue keeps no other out.
    """

    # Jobs that may wait for one model. Running ones do not count. None: any number.
    max_waiting_jobs: int | None = 1000
    # Prompt tokens and tokens asked for of all jobs that wait for one model. None: any number.
    max_waiting_tokens: int | None = None
    # How long a job and its log can be read after its end.
    retention_s: float = 300.0


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """What a tenant may have of the queue."""

    # Its share of what is served while others want some as well, in proportion to theirs.
    weight: float = 1.0
    # Its jobs that may wait, for all models. Running ones do not count. None: any number.
    max_waiting_jobs: int | None = None
    # Prompt tokens and tokens asked for of all its waiting jobs. None: any number.
    max_waiting_tokens: int | None = None

    def __post_init__(self) -> None:
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"a weight is {MIN_WEIGHT} to {MAX_WEIGHT}, not {self.weight}")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on its way into the queue, and what it is let in by."""

    job: job_pb2.Job
    # Of the request as its client sent it: the same id with another digest is another request.
    digest: bytes
    # What may wait already for a new job to be let in.
    limits: QueueLimits
    policy: TenantPolicy = TenantPolicy()
    # The most tokens that may be served before it. None: any number.
    max_tokens_ahead: int | None = None
    # How long it may take from now to its end. None: as long as it takes.
    timeout_ms: int | None = None
    # How long it runs on when nobody watches it any more. None: as long as it takes.
    grace_ms: int | None = None
    # Who watches it; empty for nobody.
    gateway_id: str = ""
    durability: Durability = Durability.LOCAL


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job is in the queue, or was already."""

    is_new: bool
    state: JobState
    # Jobs ahead of it in the order they are served; 0 is next. 0 as well when it does not wait.
    queue_position: int
    # Prompt tokens and tokens asked for of the jobs ahead, taken as so many average ones of those that wait.
    tokens_ahead: int
    # As it is stored: not the job that was submitted, if one with its id was there before.
    job: job_pb2.Job


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job at one moment."""

    state: JobState
    # Jobs ahead of it in the order they are served; 0 is next. 0 as well when it does not wait.
    queue_position: int
    # Prompt tokens and tokens asked for of the jobs ahead, taken as so many average ones of those that wait.
    tokens_ahead: int
    # Tokens logged over all choices.
    end_position: int
    # Set in every terminal state.
    outcome: job_pb2.Outcome | None
    job: job_pb2.Job


@dataclass(frozen=True, slots=True)
class LogSnapshot:
    """What a job has generated behind some position, and whether that is all."""

    state: JobState
    end_position: int
    # Set in every terminal state.
    outcome: job_pb2.Outcome | None
    entries: Sequence[job_pb2.LogEntry]


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """How much waits for a model and runs in a shard, or in all that answered, and on which workers."""

    # Jobs to be scored are not among these.
    waiting_jobs: int
    # Prompt tokens and tokens asked for of all waiting jobs.
    waiting_tokens: int
    running_jobs: int
    # Jobs of all models set aside because their workers died with them, again and again.
    dead_jobs: int
    # Each live worker's last status, of those that serve the model, and how many milliseconds old it is.
    workers: Sequence[tuple[job_pb2.WorkerStatus, int]]
    # Jobs to be scored that wait, and their tokens.
    waiting_scoring_jobs: int = 0
    waiting_scoring_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that is this worker's for as long as it keeps the lease."""

    job_id: str
    # Proves the claim; goes back with every push.
    fence: str
    job: job_pb2.Job
    # What earlier attempts generated, from position 0.
    log: Sequence[job_pb2.LogEntry]
    # Where the next entry starts.
    end_position: int
    # 1 for a job that never lost its worker.
    attempt: int
    # From arrival to the first claim of all.
    waited_ms: int
    # Whether it lost workers in a way that makes it run alone: its worker claims nothing beside it.
    is_solo: bool = False
    # Whether nobody has held it before, not even to give it back.
    is_first_claim: bool = True
    # When its claim was first asked for, by the claimer's clock: the lease began then or later. An answer may be lost.
    asked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PushItem:
    """What one step brought for one job. With neither entry nor outcome it only renews the lease."""

    job_id: str
    fence: str
    # Where the log ended before this item.
    start_position: int
    # Ends behind `start_position`: an entry holds at least one token.
    entry: job_pb2.LogEntry | None = None
    # Comes after the entry, and ends the job.
    outcome: job_pb2.Outcome | None = None
    # Whether the lease begins anew. Needed with the first entry of a claim, which shows that the job did not kill its
    # worker, and then at least every third of a lease; without it a push costs Redis less.
    renews: bool = True


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that failed because its workers died with it, kept for a day for a person to look at."""

    job_id: str
    # Since it died.
    age_ms: int
    # Tokens logged over all choices.
    end_position: int
    job: job_pb2.Job


class PushStatus(Enum):
    """What became of a PushItem. Anything but OK: the worker drops the job."""

    OK = "ok"
    # The job is another's now, has ended, or is gone.
    FENCED = "fenced"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    # The log does not end where the item starts.
    POSITION = "position"


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep set right."""

    # Jobs that lost their worker and wait again.
    requeued: int = 0
    # Jobs whose deadline passed.
    expired: int = 0
    # Jobs that killed too many workers and are dead.
    poisoned: int = 0
    # Leases extended because nobody could have renewed them.
    amnestied: int = 0
    # Jobs that nobody watched any more, and whose grace was over.
    abandoned: int = 0

    def __add__(self, other: "SweepReport") -> "SweepReport":
        return SweepReport(
            requeued=self.requeued + other.requeued,
            expired=self.expired + other.expired,
            poisoned=self.poisoned + other.poisoned,
            amnestied=self.amnestied + other.amnestied,
            abandoned=self.abandoned + other.abandoned,
        )
