"""The Redis contract between gateway and worker: a queue of jobs, their leases and their token logs.

A gateway submits jobs and reads their news (Submitter, Inbox); a worker claims them and pushes tokens (Claimer);
either keeps the queue in order (Sweeper, Reconciler). `keys.py` names everything that is stored, `functions.lua` is
everything that changes it.
"""

from oasst_jobs.claimer import Claimer
from oasst_jobs.client import QueueClient
from oasst_jobs.connection import ServerAddress, connect
from oasst_jobs.errors import (
    JobNotAcceptedError,
    OtherShardsError,
    PoisonedPromptError,
    QueueError,
    QueueFullError,
    QueueUnavailableError,
    RequestConflictError,
    TenantFullError,
    TooMuchAheadError,
    UnavailableReason,
    UnsupportedServerError,
)
from oasst_jobs.functions import JOB_VERSION, job_size, num_prompt_tokens, scoring_queue
from oasst_jobs.inbox import Inbox, Subscription
from oasst_jobs.outcomes import STREAM_DIVERGED, is_end_of_job
from oasst_jobs.reconciler import Reconciler
from oasst_jobs.records import (
    MAX_WEIGHT,
    MIN_WEIGHT,
    ClaimedJob,
    DeadLetter,
    Durability,
    JobSnapshot,
    JobState,
    LogSnapshot,
    PushItem,
    PushStatus,
    QueueLimits,
    QueueLoad,
    Submission,
    Submitted,
    SweepReport,
    TenantPolicy,
)
from oasst_jobs.submitter import Submitter, job_id_for
from oasst_jobs.sweeper import Sweeper

__all__ = [
    "JOB_VERSION",
    "MAX_WEIGHT",
    "MIN_WEIGHT",
    "STREAM_DIVERGED",
    "ClaimedJob",
    "Claimer",
    "DeadLetter",
    "Durability",
    "Inbox",
    "JobNotAcceptedError",
    "JobSnapshot",
    "JobState",
    "LogSnapshot",
    "OtherShardsError",
    "PoisonedPromptError",
    "PushItem",
    "PushStatus",
    "QueueClient",
    "QueueError",
    "QueueFullError",
    "QueueLimits",
    "QueueLoad",
    "QueueUnavailableError",
    "Reconciler",
    "RequestConflictError",
    "ServerAddress",
    "Submission",
    "Submitted",
    "Submitter",
    "Subscription",
    "SweepReport",
    "Sweeper",
    "TenantFullError",
    "TenantPolicy",
    "TooMuchAheadError",
    "UnavailableReason",
    "UnsupportedServerError",
    "connect",
    "is_end_of_job",
    "job_id_for",
    "job_size",
    "num_prompt_tokens",
    "scoring_queue",
]
