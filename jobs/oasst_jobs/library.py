"""The library of Redis functions: its text, its name, and how it gets onto a server and off again.

A library's name holds a hash of its text, so libraries of several versions live beside each other while a fleet is
being replaced. Every process announces the version it uses with each sweep; what nobody has announced for a while goes
when the next version is loaded. A process whose library went all the same loads it again at its next call.
"""

import hashlib
import importlib.resources
from dataclasses import dataclass, field

from oasst_jobs.connection import RedisClient, on_all_primaries
from oasst_jobs.errors import QueueUnavailableError, UnavailableReason

__all__ = ["LIBRARY", "FunctionLibrary", "install", "remove_unused"]

_NAME = "oasst_jobs_"


@dataclass(frozen=True)
class FunctionLibrary:
    """Functions as `functions.lua` writes them."""

    source: str
    version: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", hashlib.sha256(self.source.encode()).hexdigest()[:16])

    @property
    def name(self) -> str:
        return f"{_NAME}{self.version}"

    @property
    def code(self) -> str:
        """What FUNCTION LOAD takes."""
        return f"#!lua name={self.name}\nlocal VERSION = '{self.version}'\n{self.source}"

    def function(self, name: str) -> str:
        """What FCALL takes for the function that the source calls by this name."""
        return f"oasst_{name}_{self.version}"


LIBRARY = FunctionLibrary(importlib.resources.files("oasst_jobs").joinpath("functions.lua").read_text(encoding="utf-8"))


async def install(redis: RedisClient, library: FunctionLibrary) -> None:
    """Every server has the functions.

    Raises:
        QueueUnavailableError: if one cannot be reached, or does not let this user load functions.
    """
    try:
        # The name tells the text, so what is replaced is the same.
        await on_all_primaries(redis, "FUNCTION", "LOAD", "REPLACE", library.code)
    except QueueUnavailableError as error:
        if error.reason is not UnavailableReason.ACCESS_DENIED:
            raise
        message = f"{library.name} is not loaded, and this user may not: load it as another (python -m oasst_jobs load)"
        raise QueueUnavailableError(error.reason, message) from error


async def remove_unused(redis: RedisClient, used_versions: set[str]) -> list[str]:
    """Only libraries of these versions are left, of those that are ours. Returns the names of the others."""
    names: set[str] = set()
    for listing in await on_all_primaries(redis, "FUNCTION", "LIST", "LIBRARYNAME", f"{_NAME}*"):
        names |= {library[library.index(b"library_name") + 1].decode() for library in listing}
    unused = sorted(name for name in names if name.removeprefix(_NAME) not in used_versions)
    for name in unused:
        await on_all_primaries(redis, "FUNCTION", "DELETE", name)
    return unused
