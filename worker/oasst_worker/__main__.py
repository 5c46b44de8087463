"""Runs one worker as a process: `python -m oasst_worker --help`."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from oasst_jobs import QueueError, failpoints
from oasst_telemetry import ProbeServer, Tracer, TracingError, log_to_stderr, start_tracer
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics

from oasst_worker.health import WorkerHealth
from oasst_worker.loop import EngineStalledError
from oasst_worker.settings import FAILPOINTS, StartError, WorkerSettings, read_settings, unread_variables

if TYPE_CHECKING:
    from oasst_worker.served_model import ServedModel
    from oasst_worker.worker import Worker

__all__ = ["ModelLoader", "main", "serve"]

ModelLoader = Callable[[WorkerSettings], "ServedModel"]

logger = logging.getLogger(__name__)

_EXIT_FAILED = 1
_EXIT_BAD_OPTION = 2

# How long a step may still run once everything else has ended.
_LAST_STEP_S = 5.0


def main(arguments: Sequence[str] = sys.argv[1:], *, load: ModelLoader | None = None) -> int:
    """Serves until SIGTERM or SIGINT; the process's exit code. `load` makes the model, if not from a checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave_early)
    try:
        settings = read_settings(arguments)
        log_to_stderr(level=settings.log_level, log_format=settings.log_format)
        for name in unread_variables():
            logger.warning("environment variable is no option name=%s", name)
        failpoints.arm(failpoints.parse_failpoints(settings.failpoints, known=FAILPOINTS))
        # When each series began: a sixth of the page, and nobody reads it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # Shown from the start: whoever dies while it loads is seen to begin anew.
        health = WorkerHealth(silence_limit_s=settings.step_limit_s)
        server = _start_probe_server(settings, health, registry)
        tracer = _start_tracer(settings)
        worker = _make_worker(settings, registry, health, tracer, load)
    except StartError as error:
        return _tell(str(error), _EXIT_BAD_OPTION)
    exit_code = serve(worker, server)
    for number in (signal.SIGTERM, signal.SIGINT):  # Python's own handlers are back, and it ends soon as it is.
        signal.signal(number, signal.SIG_IGN)
    server.close()
    tracer.close()
    if not worker.join_engine(_LAST_STEP_S):
        # The interpreter's own end would wait for, or crash in, a thread that is inside the model.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def serve(worker: "Worker", server: ProbeServer) -> int:
    """Serves until asked to stop or until a part fails, and says which; the process's exit code."""
    try:
        asyncio.run(worker.serve(metrics_address=server.address))
    except QueueError as error:
        return _tell(str(error), _EXIT_FAILED)
    except BaseExceptionGroup as group:
        cause = next(_leaves(group))
        if not isinstance(cause, EngineStalledError):
            logger.error("a part of the worker failed", exc_info=cause)
        return _tell(f"{type(cause).__name__}: {cause}", _EXIT_FAILED)
    return 0


def _make_worker(
    settings: WorkerSettings,
    registry: CollectorRegistry,
    health: WorkerHealth,
    tracer: Tracer,
    load: ModelLoader | None,
) -> "Worker":
    # PyTorch takes seconds to import. A mistyped option is told, and a signal obeyed, without waiting for it.
    from oasst_worker.worker import Worker

    if load is None:
        from oasst_worker.loading import load_model

        load = load_model
    return Worker(settings, load(settings), registry, health, tracer)


def _start_probe_server(settings: WorkerSettings, health: WorkerHealth, registry: CollectorRegistry) -> ProbeServer:
    try:
        return ProbeServer(settings.metrics_listen, health, registry)
    except OSError as error:
        raise StartError(f"--metrics-listen {settings.metrics_listen}: {error.strerror or error}") from error


def _start_tracer(settings: WorkerSettings) -> Tracer:
    try:
        return start_tracer(settings.otlp_endpoint, service="oasst-worker", instance=settings.worker_id)
    except TracingError as error:
        raise StartError(f"--otlp-endpoint: {error}") from error


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The errors that the group is made of, the first failed part's first."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _leave_early(signal_number: int, frame: FrameType | None) -> None:
    """Nothing is claimed before the model is loaded, so there is nothing to give back."""
    raise SystemExit(0)


def _tell(reason: str, exit_code: int) -> int:
    sys.stderr.write(f"oasst_worker: {reason}\n")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
