"""Several gateway processes behind one port. The parent serves no chat: it starts, watches, replaces and stops them.

The kernel spreads connections over the processes, each of which listens at the port (SO_REUSEPORT). Each process is
`python -m oasst_gateway` with our own arguments and an id, a socket for its metrics and a resume secret of our giving.

SIGTERM, SIGINT   all processes drain; a second one cuts off what is open
SIGHUP            new processes serve, which read files and settings anew; then the old ones drain
"""

import asyncio
import ctypes
import http.client
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from http import HTTPStatus
from pathlib import Path

from oasst_telemetry import Check
from prometheus_client import CollectorRegistry

from oasst_gateway.errors import StartError
from oasst_gateway.gathered import GatheredMetrics
from oasst_gateway.metrics import FleetMetrics
from oasst_gateway.probes import serving_probes
from oasst_gateway.settings import GatewaySettings

__all__ = ["run_fleet"]

logger = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 1.0
# A process that says of itself that its event loop stands still, or says nothing, so many looks in a row, is killed.
_MAX_SILENT_LOOKS = 10
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 30.0
# The signals, where they came before the process could handle them: it had no chat open yet.
_GOOD_ENDS = (0, -signal.SIGTERM, -signal.SIGINT)
_EXIT_NOT_STARTED = 1
_PR_SET_PDEATHSIG = 1


async def run_fleet(
    settings: GatewaySettings, arguments: Sequence[str], *, max_silent_looks: int = _MAX_SILENT_LOOKS
) -> int:
    """Serves with `settings.processes` processes until asked to stop; the exit code.

    Looks are a second apart, two where a process says nothing.

    Raises:
        StartError: if an address is taken.
    """
    with ExitStack() as stack:
        reserved = stack.enter_context(_reserve(settings.listen))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oasst-gateway-")))
        listen = f"{settings.listen.rpartition(':')[0]}:{reserved.getsockname()[1]}"
        fleet = _Fleet(settings, arguments, listen=listen, folder=folder, max_silent_looks=max_silent_looks)
        metrics = None
        if settings.metrics:
            metrics = stack.enter_context(serving_probes(settings.metrics_listen, fleet, fleet.registry))
        event = {
            "event": "serving",
            "role": "gateway",
            "id": settings.gateway_id,
            "listen": listen,
            "metrics": metrics,
        }
        return await fleet.run(on_serving=lambda: print(json.dumps(event), flush=True))


class _Fleet:
    """Owns the processes. Ready while any of them is, alive while our own event loop turns."""

    def __init__(
        self, settings: GatewaySettings, arguments: Sequence[str], *, listen: str, folder: Path, max_silent_looks: int
    ) -> None:
        self.registry = CollectorRegistry()
        self._metrics = FleetMetrics(self.registry)
        self._gathered = GatheredMetrics()
        self.registry.register(self._gathered)
        self._settings = settings
        self._arguments = arguments
        self._listen = listen
        self._folder = folder
        self._max_silent_looks = max_silent_looks
        secret = settings.resume_secret
        # A resume token of one process must be good at the others.
        self._environment = os.environ | {
            "OASST_GATEWAY_RESUME_SECRET": secret.get_secret_value() if secret else secrets.token_hex(32)
        }
        self._num_started = 0
        self._keepers: list[_Keeper] = []  # Those that callers are to find.
        self._runs: dict[asyncio.Task[int], _Keeper] = {}  # And those that drain.
        self._asked_to_stop = asyncio.Event()
        self._asked_to_reload = asyncio.Event()
        self._turned_s = time.monotonic()

    def readiness(self) -> Check:
        """Any thread may ask."""
        if self._asked_to_stop.is_set():
            return Check(False, "leaving")
        is_ready = any(keeper.is_ready for keeper in self._keepers)
        return Check(is_ready, "serving" if is_ready else "no process is ready")

    def liveness(self) -> Check:
        """Any thread may ask."""
        silent_s = time.monotonic() - self._turned_s
        if silent_s > _LOOK_INTERVAL_S * _MAX_SILENT_LOOKS:
            return Check(False, f"the event loop has been silent for {silent_s:.1f} s")
        return Check(True, "in progress")

    async def run(self, *, on_serving: Callable[[], None]) -> int:
        """Serves until a signal; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_reload.set)
        turning = asyncio.create_task(self._turn())
        self._keepers = self._start_all()
        code = await self._all_serve(self._keepers)
        if code is None:
            on_serving()
            await self._reload_until_stopped()
        elif not self._asked_to_stop.is_set():
            self._stop(signal.SIGTERM)
            await asyncio.gather(*self._runs)
            turning.cancel()
            return code
        codes = await asyncio.gather(*self._runs)
        turning.cancel()
        return next((code for code in codes if code not in _GOOD_ENDS), 0)

    def _start_all(self) -> list["_Keeper"]:
        keepers = [
            _Keeper(self._start_one, self._gathered, self._metrics, max_silent_looks=self._max_silent_looks)
            for _ in range(self._settings.processes)
        ]
        for keeper in keepers:
            self._runs[asyncio.create_task(keeper.run())] = keeper
        return keepers

    async def _start_one(self) -> "_Process":
        self._num_started += 1
        name = f"{self._settings.gateway_id}-{self._num_started}"
        return await _Process.start(
            name,
            socket_path=self._folder / f"{self._num_started}.sock",
            arguments=[*self._arguments, "--processes", "1", "--listen", self._listen, "--reuse-port"],
            environment=self._environment,
        )

    async def _all_serve(self, keepers: Sequence["_Keeper"]) -> int | None:
        """None once all serve; the exit code of the first that ended instead."""
        serving = asyncio.create_task(_wait_for_all([keeper.served for keeper in keepers]))
        ends = [run for run, keeper in self._runs.items() if keeper in keepers]
        await asyncio.wait([serving, *ends], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            return None
        serving.cancel()
        return next(run.result() for run in ends if run.done())

    async def _reload_until_stopped(self) -> None:
        stopped = asyncio.create_task(self._asked_to_stop.wait())
        while not stopped.done():
            asked = asyncio.create_task(self._asked_to_reload.wait())
            await asyncio.wait([stopped, asked], return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            if not stopped.done():
                self._asked_to_reload.clear()
                await self._reload()

    async def _reload(self) -> None:
        logger.info("reloading processes=%d", self._settings.processes)
        keepers = self._start_all()
        code = await self._all_serve(keepers)
        retired = keepers
        if code is None:
            retired, self._keepers = self._keepers, keepers
            logger.info("reloaded, the processes before drain")
        elif not self._asked_to_stop.is_set():
            logger.error("reload failed, the processes before go on exit_code=%d", code)
        for keeper in retired:
            keeper.retire(signal.SIGTERM)
        self._runs = {run: keeper for run, keeper in self._runs.items() if not run.done()}

    def _stop(self, number: signal.Signals) -> None:
        self._asked_to_stop.set()
        for keeper in self._runs.values():
            keeper.retire(number)

    async def _turn(self) -> None:
        while True:
            self._turned_s = time.monotonic()
            self._metrics.processes.set(sum(keeper.is_ready for keeper in self._keepers))
            await asyncio.sleep(_LOOK_INTERVAL_S)


class _Keeper:
    """Keeps one process running until it is retired: one that served and died is followed by another."""

    def __init__(
        self,
        start: Callable[[], Awaitable["_Process"]],
        gathered: GatheredMetrics,
        metrics: FleetMetrics,
        *,
        max_silent_looks: int,
    ) -> None:
        self._start = start
        self._gathered = gathered
        self._metrics = metrics
        self._max_silent_looks = max_silent_looks
        self._process: _Process | None = None
        self._retired = asyncio.Event()
        self.served = asyncio.Event()  # Since the first process served.
        self.is_ready = False

    async def run(self) -> int:
        """The exit code of the last process: once retired, or once one ended before any has served."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = time.monotonic()
            try:
                self._process = process = await self._start()
            except OSError as error:  # No memory, or no process more, for now.
                logger.error("process not started error=%s", error)
                code = _EXIT_NOT_STARTED
            else:
                if self._retired.is_set():
                    process.send(signal.SIGTERM)
                code = await self._watch(process)
            if self._retired.is_set() or not self.served.is_set():
                return code
            if time.monotonic() - started_s > _MAX_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            self._metrics.restarts.inc()
            logger.error("process died, another follows exit_code=%d backoff_s=%g", code, backoff_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._retired.wait()
                return code
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    def retire(self, number: signal.Signals) -> None:
        """The process is asked to stop, and has no successor."""
        self._retired.set()
        self.is_ready = False
        if self._process is not None:
            self._process.send(number)

    async def _watch(self, process: "_Process") -> int:
        """Looks after the process until it ends; its exit code."""
        looking = asyncio.create_task(self._look_after(process))
        code = await process.wait()
        looking.cancel()
        self.is_ready = False
        self._gathered.depart(process.name)
        return code

    async def _look_after(self, process: "_Process") -> None:
        if not await process.wait_serving():
            return
        silent_looks = 0
        while True:
            silent_looks = silent_looks + 1 if await process.is_silent() else 0
            if silent_looks >= self._max_silent_looks:
                logger.error("process hangs, killed process=%s", process.name)
                process.send(signal.SIGKILL)
                return
            try:
                await self._look(process, is_silent=silent_looks > 0)
            except Exception:
                logger.exception("look failed process=%s", process.name)
                self._metrics.look_failures.inc()
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def _look(self, process: "_Process", *, is_silent: bool) -> None:
        # Each further question to a silent one would only put off the next look.
        self.is_ready = not is_silent and not self._retired.is_set() and await process.is_ready()
        if self.is_ready:
            self.served.set()
        if not is_silent and (page := await process.metrics_page()):
            self._gathered.record(process.name, page)


class _Process:
    """One gateway process, which dies with us."""

    def __init__(self, name: str, socket_path: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._socket_path = socket_path
        self._process = process

    @classmethod
    async def start(
        cls, name: str, *, socket_path: Path, arguments: Sequence[str], environment: dict[str, str]
    ) -> "_Process":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "oasst_gateway", *arguments),
            *("--gateway-id", name, "--metrics", "--metrics-listen", f"unix:{socket_path}"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            # A terminal's Ctrl-C reaches it only through us: twice would cut off open chats.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        return cls(name, socket_path, process)

    async def wait_serving(self) -> bool:
        """Whether it serves; false if it ended before."""
        return self._process.stdout is not None and bool(await self._process.stdout.readline())

    async def wait(self) -> int:
        """The exit code, negative for a signal."""
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def is_silent(self) -> bool:
        return await self._get("/healthz") is None

    async def is_ready(self) -> bool:
        return await self._get("/readyz") is not None

    async def metrics_page(self) -> str | None:
        """In the OpenMetrics format; None if it does not answer."""
        return await self._get("/metrics")

    async def _get(self, path: str) -> str | None:
        return await asyncio.to_thread(_get, self._socket_path, path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_LOOK_INTERVAL_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _get(socket_path: Path, path: str) -> str | None:
    """The body of a good answer; None for any other, or none."""
    connection = _UnixConnection(socket_path)
    try:
        connection.request("GET", path, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        response = connection.getresponse()
        return response.read().decode() if response.status == HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _reserve(listen: str) -> socket.socket:
    """A socket bound to the address, which others may share from now on. It takes no connection, it keeps the port.

    Raises:
        StartError: if somebody has the address already.
    """
    host, _, port = listen.rpartition(":")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as alone:  # Sharing with a stranger would succeed unnoticed.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        reserved = socket.socket(family)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {listen}: {error.strerror}") from error
    return reserved


async def _wait_for_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


def _die_with_parent() -> None:
    """Between fork and exec: should we be killed, the process drains and ends as well. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
