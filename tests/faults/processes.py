"""Gateways and workers as processes, and what can be done to them."""

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from metric_page import total_of

__all__ = ["ServiceProcess"]

# On an undisturbed machine a process serves after two seconds; how long it takes beside others proves nothing.
_START_TIMEOUT_S = 150.0
_STOP_TIMEOUT_S = 60.0


class ServiceProcess:
    """A gateway or a worker that serves."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, announced: dict[str, str]) -> None:
        self.name = name
        # What it said of itself when it began to serve.
        self.announced = announced
        self._process = process

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str]
    ) -> "ServiceProcess":
        """The process serves."""
        with log.open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                # Thousands are started: none but the first has to compile what it imports.
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environment},
            )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                line = await process.stdout.readline()
            return cls(name, process, json.loads(line))
        except (TimeoutError, ValueError) as error:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise RuntimeError(f"{name} does not serve; its log: {log}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def listen(self) -> str:
        return self.announced["listen"]

    def kill(self) -> None:
        """It is gone as by `kill -9`."""
        self.signal(signal.SIGKILL)

    def terminate(self) -> None:
        """It is asked to stop."""
        self.signal(signal.SIGTERM)

    def pause(self) -> None:
        """It stands still, its connections stay open."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on where it was paused, and does not know that it was."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        if self.is_running:
            self._process.send_signal(number)

    async def wait(self, timeout_s: float = _STOP_TIMEOUT_S) -> int:
        """Its exit code, negative for a signal, once it has ended."""
        async with asyncio.timeout(timeout_s):
            return await self._process.wait()

    async def end(self) -> None:
        """Nothing of it is left."""
        if self.is_running:
            self._process.kill()
            await self._process.wait()

    async def get(self, path: str) -> str:
        """What it answers at its HTTP address."""

        def fetch() -> str:
            with urllib.request.urlopen(f"http://{self.announced['metrics']}{path}", timeout=10) as answer:
                return answer.read().decode()

        return await asyncio.to_thread(fetch)

    async def metric(self, name: str, **labels: str) -> float:
        """The sum over the metric's samples that carry these labels."""
        return total_of(await self.get("/metrics"), name, **labels)
