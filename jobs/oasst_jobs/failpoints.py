"""Named places where a test can make a process die, hang or fail. All are off unless its settings arm some.

In the code a place is one line, `failpoints.reach("worker.claimed")`. A deployable's `__main__` arms what its option
names, `NAME=ACTION` parted by commas:

    worker.claimed=kill            the process is gone, as by kill -9
    worker.pushing=hang:2.5        the thread that comes here sleeps so many seconds, and its event loop with it
    gateway.accepted=fail          raises FailpointError
    worker.pushed=kill@10          acts at the tenth time only, and not at every time
"""

import logging
import re
import signal
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Action", "Failpoint", "FailpointError", "arm", "parse_failpoints", "reach"]

_log = logging.getLogger(__name__)

_ITEM = re.compile(r"([^=]+)=(?:(kill|fail)|hang:(\d+(?:\.\d+)?))(?:@([1-9]\d*))?")


class Action(StrEnum):
    """What happens at an armed place."""

    KILL = "kill"
    HANG = "hang"
    FAIL = "fail"


class FailpointError(RuntimeError):
    """A place that was armed to fail was reached."""


@dataclass(frozen=True, slots=True)
class Failpoint:
    """One armed place."""

    name: str
    action: Action
    hang_s: float = 0.0
    # Acts at this time only, counted from 1; at every time if None.
    at: int | None = None


# The places of this process that are armed, and how often each was reached. Written by `arm` alone, at the start. This
# is the one state of a module in the project: handing it down to every place would put it into every signature.
_armed: dict[str, Failpoint] = {}
_times_reached: dict[str, int] = {}


def parse_failpoints(text: str, *, known: Collection[str]) -> tuple[Failpoint, ...]:
    """The failpoints that `text` lists.

    Raises:
        ValueError: if one is not as above, or its name is not among the known ones.
    """
    return tuple(_parse(item.strip(), known) for item in text.split(",") if item.strip())


def arm(failpoints: Iterable[Failpoint]) -> None:
    """These places act from now on, and no others."""
    _armed.clear()
    _times_reached.clear()
    _armed.update({failpoint.name: failpoint for failpoint in failpoints})
    if _armed:
        _log.warning("failpoints armed: %s", ", ".join(_armed))


def reach(name: str) -> None:
    """The code has come to the place of this name."""
    if _armed and name in _armed:
        _act(_armed[name])


def _parse(item: str, known: Collection[str]) -> Failpoint:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise ValueError(f"{item!r} is not NAME=kill, NAME=fail or NAME=hang:SECONDS, each perhaps with @TIME")
    name, action, hang_s, at = match.groups()
    if name not in known:
        raise ValueError(f"there is no failpoint {name!r}, only {', '.join(sorted(known))}")
    return Failpoint(name, Action(action or Action.HANG), hang_s=float(hang_s or 0), at=int(at) if at else None)


def _act(failpoint: Failpoint) -> None:
    _times_reached[failpoint.name] = times = _times_reached.get(failpoint.name, 0) + 1
    if failpoint.at not in (None, times):
        return
    if failpoint.action is Action.KILL:
        signal.raise_signal(signal.SIGKILL)
    elif failpoint.action is Action.HANG:
        time.sleep(failpoint.hang_s)
    else:
        raise FailpointError(f"failpoint {failpoint.name}")
