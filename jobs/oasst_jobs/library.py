"""The library of Redis functions: its text, its name, and how it gets onto a server and off again.

A library's name holds a hash of its text, so libraries of several versions live beside each other while a fleet is
being replaced. Every process announces the version it uses with each sweep; what nobody has announced for a while goes
when the next version is loaded. A process whose library went all the same loads it again at its next call.
"""

import hashlib
import importlib.resources
from contextlib import suppress
from dataclasses import dataclass, field

from oasst_jobs.connection import Primary, RedisClient, ask, on_all_primaries, on_each_primary
from oasst_jobs.errors import LibraryMissingError, QueueUnavailableError, UnavailableReason

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
    """Every server that is not away has the functions.

    Raises:
        QueueUnavailableError: if all are away, or do not let this user load functions.
    """
    try:
        # The name tells the text, so what is replaced is the same.
        await on_all_primaries(redis, "FUNCTION", "LOAD", "REPLACE", library.code)
    except QueueUnavailableError as error:
        if error.reason is not UnavailableReason.ACCESS_DENIED:
            raise
        message = f"{library.name} is not loaded, and this user may not: load it as another (python -m oasst_jobs load)"
        raise QueueUnavailableError(error.reason, message) from error


async def remove_unused(redis: RedisClient, used_versions: set[str]) -> None:
    """Only libraries of these versions are left, of those that are ours, on servers that are not away."""

    async def remove(server: Primary) -> None:
        for library in await ask(server, "FUNCTION", "LIST", "LIBRARYNAME", f"{_NAME}*"):
            name = library[library.index(b"library_name") + 1].decode()
            if name.removeprefix(_NAME) not in used_versions:
                with suppress(LibraryMissingError):  # Another process was faster.
                    await ask(server, "FUNCTION", "DELETE", name)

    await on_each_primary(redis, remove)
