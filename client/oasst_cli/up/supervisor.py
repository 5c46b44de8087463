"""Keeps processes running: starts them, says when they serve, restarts those that die, and knows when to give up."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from oasst_cli.up.child import Announcement, Child

__all__ = [
    "UNUSABLE_EXIT_CODE",
    "Command",
    "Keeper",
    "Observer",
    "RestartPolicy",
    "Service",
    "ServiceFailedError",
    "keep_running",
]

# The exit code by which a process of ours says that its options or its model can never work.
UNUSABLE_EXIT_CODE = 2


# A command line. Given what the process announced when it ran before, so that it comes back at the same address.
Command = Callable[[Announcement | None], Sequence[str]]


@dataclass(frozen=True)
class Service:
    """A process that should run."""

    name: str
    role: str
    command: Command
    # On top of our own environment.
    environment: Mapping[str, str] = field(default_factory=dict)
    # Waits until the process serves; None if it ends before.
    readiness: Callable[[Child], Awaitable[Announcement | None]] = Child.announcement
    # How long it may take to end once asked to.
    grace_s: float = 40.0


@dataclass(frozen=True)
class RestartPolicy:
    """When a process that died comes back, and when it does not."""

    # This many starts in a row without ever serving are enough.
    max_failed_starts: int = 3
    first_delay_s: float = 0.25
    max_delay_s: float = 10.0
    # Serving this long makes up for the deaths before.
    healthy_s: float = 10.0

    def delay_s(self, deaths: int) -> float:
        """The wait before the start that follows this many deaths in a row.

        >>> [RestartPolicy().delay_s(deaths) for deaths in (1, 2, 3, 9)]
        [0.25, 0.5, 1.0, 10.0]
        """
        doublings = min(deaths - 1, 30)  # Enough for any bound, and no overflow.
        return min(self.first_delay_s * 2.0**doublings, self.max_delay_s)


class Observer(Protocol):
    """Who wants to know what becomes of the services."""

    def served(self, name: str, announcement: Announcement) -> None: ...
    def died(self, name: str, reason: str, restart_in_s: float) -> None: ...


class ServiceFailedError(Exception):
    """A service cannot be kept running."""

    def __init__(self, name: str, reason: str, *, is_unusable: bool) -> None:
        super().__init__(f"{name} {reason}")
        # Its options or its model can never work, so that trying again makes no sense.
        self.is_unusable = is_unusable


class Keeper:
    """Owns one service's process from its first start to its end."""

    def __init__(self, service: Service, *, log_dir: Path, observer: Observer, policy: RestartPolicy) -> None:
        self.service = service
        self._log = log_dir / f"{service.name}.log"
        self._observer = observer
        self._policy = policy
        self._child: Child | None = None
        self._announcement: Announcement | None = None
        self._has_served = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The process running now, if one is."""
        return self._child.pid if self._child else None

    @property
    def has_served(self) -> bool:
        return self._has_served.is_set()

    def last_words(self) -> str:
        """The last line of the process running now."""
        return self._child.last_words() if self._child else ""

    async def wait_until_serving(self) -> Announcement:
        """What the service announced when it first served."""
        await self._has_served.wait()
        if self._announcement is None:
            raise RuntimeError(f"{self.service.name} serves but has announced nothing")
        return self._announcement

    async def run(self) -> None:
        """The service runs, restarted as often as it dies, until this is cancelled; then it has stopped.

        Raises:
            ServiceFailedError: it cannot be kept running.
        """
        deaths = failed_starts = 0
        while True:
            served_s, code, last_words = await self._run_once()
            reason = _reason(code, last_words)
            failed_starts = failed_starts + 1 if served_s is None else 0
            is_unusable = served_s is None and code == UNUSABLE_EXIT_CODE
            if is_unusable or failed_starts >= self._policy.max_failed_starts:
                raise ServiceFailedError(self.service.name, reason, is_unusable=is_unusable)
            deaths = 1 if (served_s or 0.0) >= self._policy.healthy_s else deaths + 1
            delay_s = self._policy.delay_s(deaths)
            self._observer.died(self.service.name, reason, delay_s)
            await asyncio.sleep(delay_s)

    def kill(self) -> None:
        """Ends the process at once."""
        if self._child:
            self._child.kill()

    async def _run_once(self) -> tuple[float | None, int, str]:
        """How long one process served (None if it never did), its exit code, and its last words."""
        served_s = None
        command = self.service.command(self._announcement)
        child = await Child.start(command, environment=self.service.environment, log=self._log)
        self._child = child
        try:
            if announcement := await self.service.readiness(child):
                since = asyncio.get_running_loop().time()
                self._announcement = announcement
                self._has_served.set()
                self._observer.served(self.service.name, announcement)
                code = await child.wait()
                served_s = asyncio.get_running_loop().time() - since
            else:
                code = await child.wait()
            return served_s, code, child.last_words()
        finally:
            await child.stop(self.service.grace_s)
            self._child = None


@asynccontextmanager
async def keep_running(keepers: Sequence[Keeper]) -> AsyncIterator[None]:
    """The services run inside the context and have stopped after it.

    A service that cannot be kept running cancels the body; the context then raises a group with its error.
    """
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(keeper.run(), name=keeper.service.name) for keeper in keepers]
        yield
        for task in tasks:
            task.cancel()


def _reason(code: int, last_words: str) -> str:
    """Why a process ended. One that ended by itself says it last; one that was ended may have said anything."""
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        return f'{how} after "{last_words}"' if last_words else how
    how = f"ended with exit code {code}"
    return f"{how}: {last_words}" if last_words else how
