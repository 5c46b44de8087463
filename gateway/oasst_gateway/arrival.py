"""A request that comes to the gateway: new, or once more."""

from dataclasses import dataclass

from oasst_jobs import Submitter

from oasst_gateway.tenants import Tenant

__all__ = ["Arrival"]


@dataclass(slots=True)
class Arrival:
    """A request that came. If its job is in the queue already, it has its place, and is not refused for want of one."""

    submitter: Submitter
    tenant: Tenant
    job_id: str | None  # None if it brought no id: then it was never here.
    was_accepted: bool | None = None  # None until there was cause to ask.

    @property
    def shard_number(self) -> int | None:
        """Of the shard that its job is in, or would be; None if that can be any of several."""
        if self.job_id is not None:
            return self.submitter.shard_number(self.job_id)
        return 0 if self.submitter.num_shards == 1 else None

    async def has_place(self) -> bool:
        """Whether its job is in the queue, or was and can still be read. The queue is asked once.

        Raises:
            QueueUnavailableError
        """
        if self.was_accepted is None:
            self.was_accepted = self.job_id is not None and await self.submitter.status(self.job_id) is not None
        return self.was_accepted
