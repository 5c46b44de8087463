"""The processes of a whole service on one machine, started in order and stopped in the mirror of it."""

import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from oasst_cli.up.child import Announcement
from oasst_cli.up.machine import num_cores, share_of, visible_gpus
from oasst_cli.up.state import StateDirectory, state_directory
from oasst_cli.up.supervisor import Command, Keeper, Observer, RestartPolicy, Service, keep_running
from oasst_cli.up.valkey import find_server, socket_path, socket_url, valkey_service

__all__ = ["Stack", "StackOptions", "metrics_variable"]

_ANY_PORT = "127.0.0.1:0"


@dataclass(frozen=True)
class StackOptions:
    """What to run."""

    # Checkpoint folder or hub id.
    model: str
    workers: int
    gateways: int
    # The first gateway's address; the others take the ports after it. Port 0: each its own.
    host: str
    port: int
    # None: a server of our own.
    redis_url: str | None
    # None: one that is removed at the end.
    state_dir: Path | None
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    split: str | None = None
    num_ranks: int | None = None
    # Of each gateway, behind its one port.
    gateway_processes: int = 1


class Stack:
    """Owns the processes; `running` is their life."""

    def __init__(self, options: StackOptions, *, observer: Observer, policy: RestartPolicy | None = None) -> None:
        self.options = options
        self.keepers: list[Keeper] = []
        # Of our own queue server; None where the queue is somewhere else.
        self.socket_url: str | None = None
        self._observer = observer
        self._policy = policy or RestartPolicy()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StateDirectory]:
        """The processes are started inside the context; after it they have stopped, senders before receivers.

        Raises:
            ExceptionGroup: of ServiceFailedError, if a process cannot be kept running.
            NoServerError: no queue server was given or found.
            StateInUseError, OSError: the state directory cannot be used.
        """
        async with AsyncExitStack() as exits:
            state = exits.enter_context(state_directory(self.options.state_dir))

            async def start(services: Sequence[Service]) -> None:
                keepers = [
                    Keeper(service, log_dir=state.logs, observer=self._observer, policy=self._policy)
                    for service in services
                ]
                self.keepers += keepers
                await exits.enter_async_context(keep_running(keepers))

            redis_url = self.options.redis_url
            if redis_url is None:
                server = find_server()
                socket = exits.enter_context(socket_path(state.path))
                redis_url = self.socket_url = socket_url(socket)
                await start([valkey_service(server, data_dir=state.data, socket=socket)])
                await self.wait_until_serving()
            await start(_worker_services(self.options, redis_url))
            await start(_gateway_services(self.options, redis_url))
            yield state

    async def wait_until_serving(self) -> list[tuple[Keeper, Announcement]]:
        """Every process started so far serves, and this is what each announced."""
        return [(keeper, await keeper.wait_until_serving()) for keeper in self.keepers]

    def starting(self) -> list[Keeper]:
        """The processes that have not served yet."""
        return [keeper for keeper in self.keepers if not keeper.has_served]

    def kill(self) -> None:
        """Ends every process at once."""
        for keeper in self.keepers:
            keeper.kill()


def _worker_services(options: StackOptions, redis_url: str) -> list[Service]:
    """The workers, sharing the machine's cores and GPUs evenly."""
    flags = ["--model", options.model]
    for name in ("dtype", "quantize", "device", "split", "num_ranks"):
        value = getattr(options, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if options.workers > 1 and "OASST_WORKER_THREADS" not in os.environ:
        flags += ["--threads", str(max(1, num_cores() // options.workers))]

    def command(before: Announcement | None) -> list[str]:
        return [sys.executable, "-m", "oasst_worker", *flags, *_metrics_flags("worker", before)]

    gpus = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def environment(index: int) -> dict[str, str]:
        # In the environment, not on the command line: a URL may hold a password, and command lines are public.
        variables = {"OASST_WORKER_REDIS_URL": redis_url}
        if gpus and options.workers > 1:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(share_of(gpus, index, options.workers))
        return variables

    return [
        Service(name=f"worker-{index}", role="worker", command=command, environment=environment(index))
        for index in range(options.workers)
    ]


def _gateway_services(options: StackOptions, redis_url: str) -> list[Service]:
    """The gateways, at ports one after the other."""
    environment = {
        "OASST_GATEWAY_REDIS_URL": redis_url,
        # A resume token of one gateway is good at the others, and after a restart.
        "OASST_GATEWAY_RESUME_SECRET": os.environ.get("OASST_GATEWAY_RESUME_SECRET") or secrets.token_hex(32),
    }
    return [
        Service(
            name=f"gateway-{index}",
            role="gateway",
            command=_gateway_command(options, _listen_address(options, index)),
            environment=environment,
        )
        for index in range(options.gateways)
    ]


def _gateway_command(options: StackOptions, listen: str) -> Command:
    def command(before: Announcement | None) -> list[str]:
        return [
            *(sys.executable, "-m", "oasst_gateway", "--model", options.model),
            *("--processes", str(options.gateway_processes)),
            *("--listen", (before and before.listen) or listen),
            *_metrics_flags("gateway", before),
        ]

    return command


def _metrics_flags(role: str, before: Announcement | None) -> list[str]:
    """Metrics are served where they were before; else where the environment says, or at a free port."""
    if before and before.metrics:
        return ["--metrics-listen", before.metrics]
    return [] if metrics_variable(role) in os.environ else ["--metrics-listen", _ANY_PORT]


def metrics_variable(role: str) -> str:
    """The variable that says where the processes of this role serve their metrics."""
    return f"OASST_{role.upper()}_METRICS_LISTEN"


def _listen_address(options: StackOptions, index: int) -> str:
    return f"{options.host}:{options.port + index if options.port else 0}"
