"""Every key of the queue in Redis: its type, who writes it, who reads it, when it goes.

A shard is one queue. All its keys carry its hash tag, so that in Redis Cluster they share a slot and one function can
change them together. The job hash is the one truth about a job; every other key is an index or a copy that could be
made again from the hashes. `functions.lua` makes the same names from the shard's root; a test holds the two together.

`oasst:{0}:job:<job id>`         hash. The job and its state, see below. Written and read by every function.
                                 Goes a retention after the job's end.
`oasst:{0}:log:<job id>`         stream. The token log; an entry's id is `<end position>-0`. Written by push, read by
                                 claim and read. Goes with its job.
`oasst:{0}:waiting:<model>`      sorted set. Job ids by place in the queue. Written by whatever queues a job or takes it
                                 out, read by claim, enqueue, attach and status. Gone when empty. What is to be scored
                                 waits in a queue of its own: wherever a model is named here, that is
                                 `<model>:scoring`.
`oasst:{0}:waiting_tokens`       hash. Model -> tokens its waiting jobs ask for. Written with `waiting`, read by
                                 enqueue, attach, status, load, reconcile and spread. A field goes with the model's last
                                 waiting job.
`oasst:{0}:tenants:<model>`      hash. Tenant -> its jobs that wait for the model. As `tenant_jobs`.
`oasst:{0}:tenant_jobs`          hash. Tenant -> its waiting jobs. Written with `waiting`, read by enqueue. A field
                                 goes with the tenant's last waiting job.
`oasst:{0}:tenant_tokens`        hash. Tenant -> tokens its waiting jobs ask for. As `tenant_jobs`.
`oasst:{0}:tenant_weights`       hash. Tenant -> its weight when its last job came to wait. As `tenant_jobs`.
`oasst:{0}:running:<model>`      sorted set. Running jobs by their claim (ms). Written by claim, reconcile and whatever
                                 takes a job from its worker, read by load. Gone when empty.
`oasst:{0}:flows:<model>`        sorted set. Virtual time: `now`, and where each tenant's last job of a lane ends, as
                                 `<lane><tenant>`. Written by enqueue, claim and whatever ends a job. A tenant that is
                                 past goes with the next claim, the key after an hour without enqueue and claim.
`oasst:{0}:leases`               sorted set. Running jobs by end of their lease (ms). Written by claim, push, sweep (an
                                 amnesty, or leases that are too long), reconcile and whatever takes a job from its
                                 worker, read by sweep and spread. Gone when empty.
`oasst:{0}:deadlines`            sorted set. Jobs that have not ended by their deadline (ms). Written by enqueue,
                                 reconcile and whatever ends a job, read by sweep. Gone when empty.
`oasst:{0}:watched`              sorted set. Jobs that end when nobody watches them any more, by when that is (ms) if
                                 nobody says otherwise. Written by enqueue, attach, keep_watching, unwatch, sweep (an
                                 amnesty), reconcile and whatever ends a job, read by sweep. Gone when empty.
`oasst:{0}:claim:<worker>`       string. The worker's last claim: its id, then the job ids. Written and read by claim.
                                 Goes after one lease.
`oasst:{0}:wake:<model>`         list. At most one token: there is work. Written by enqueue, release, sweep and claim,
                                 taken by an idle worker (BLPOP). Goes after 10 s.
`oasst:{0}:updates:<gateway>`    stream. UpdateBatch messages. Written by whatever changes a job, read and cut by the
                                 gateway's inbox (XREAD). Goes after 60 s without news.
`oasst:{0}:workers`              hash. Worker -> WorkerStatus. Written by heartbeat, read by load. A field goes 15 s
                                 after the worker's last heartbeat, if another beats; the key 15 s after anybody's.
`oasst:{0}:heartbeats`           sorted set. Workers by their last heartbeat (ms). As `workers`.
`oasst:{0}:suspects:<worker>`    set. Jobs the worker claimed and has no token of: they may be what kills it. Written by
                                 claim, push and whatever takes a job from its worker, read by sweep. Gone when empty,
                                 else two minutes after the worker's last claim or renewal, or one lease after the first
                                 of its leases that lapsed.
`oasst:{0}:dead`                 sorted set. Jobs that killed their workers, by time of death (ms). Written by sweep and
                                 revive, read by dead and load. An entry goes with its job, after a day.
`oasst:{0}:poison:<digest>`      string. A dead job's id, by digest of its tenant, model and prompt. Written by sweep,
                                 read by enqueue. Goes after an hour.
`oasst:{0}:versions`             sorted set. Versions of the function library by last use (ms). Written by sweep, read
                                 by whoever loads another version. Goes after an hour without sweep.
`oasst:{0}:counters`             hash. `swept_ms` and `swept_run`: when and in which run of the server the last sweep
                                 was (sweep); `walked_ms` and cursors of the walk, and `must_recount` when an index had
                                 an id without a job (claim, reconcile); `num_shards`: how many shards the queue's jobs
                                 are spread over (enqueue, spread). Never goes.

Fields of a job hash. All times are milliseconds of Redis's own clock.

`state`                          waiting, running, finished, cancelled, expired or failed; the last four are final
`job`                            the Job message, written once
`digest`                         of the request as its client sent it; the same id with another digest is a conflict
`model` `version` `prompt_tokens`  the queue's name, and two out of the Job, for functions that do not read protobuf
`size`                           positions the job may come to hold: prompt, and all that each choice may generate
`tenant` `lane` `weight`         whose job it is, how urgent (0, 1, 2), and its tenant's weight when it came
`choices`                        how many it has
`poison_key`                     the `poison` key of its prompt
`place`                          score in `waiting`, kept for life: a job that comes back takes its old place
`end_position`                   tokens logged over all choices
`fence`                          right of the present claim, `<number>-<claim id>`; absent while waiting
`fences`                         how many claims there were
`worker`                         whose claim the present or last one is
`lost_leases`                    how many claims lost their lease; absent for none
`charge`                         how much it is suspected of killing workers; absent for not at all
`passed_over_ms`                 when it was first passed over for want of room; absent if it was not
`kept_by` `kept_until_ms`        worker that keeps itself for it, and until when; as `passed_over_ms`
`lease_ms`                       length of the present lease
`watchers`                       gateways that watch, separated by spaces
`grace_ms`                       how long it runs on when nobody watches; absent for as long as it takes
`enqueued_ms` `claimed_ms` `deadline_ms`  arrival, first claim, deadline; the last two may be absent
`retention_ms`                   how long hash and log stay after the end
`outcome`                        the Outcome message, if a worker ended the job
"""

from dataclasses import dataclass

__all__ = ["ShardKeys"]


@dataclass(frozen=True, slots=True)
class ShardKeys:
    """The names of one shard's keys, as far as Python needs them outside a function call."""

    shard: int = 0

    @property
    def root(self) -> str:
        """What every key of the shard begins with, and the one key passed to its functions."""
        return f"oasst:{{{self.shard}}}"

    @property
    def versions(self) -> str:
        return f"{self.root}:versions"

    def wake(self, model: str) -> str:
        return f"{self.root}:wake:{model}"

    def updates(self, gateway_id: str) -> str:
        return f"{self.root}:updates:{gateway_id}"
