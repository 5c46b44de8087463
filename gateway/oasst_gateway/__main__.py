"""Runs one gateway as a process: `python -m oasst_gateway --help`.

SIGTERM, SIGINT   it drains; a second one cuts off what is open
SIGHUP            tenants, the key of tokens and TLS files are read anew, as they are within half a minute of a change;
                  with `--processes`, see `fleet`
"""

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence

from oasst_jobs import QueueError, failpoints
from oasst_telemetry import log_to_stderr
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

from oasst_gateway.errors import StartError
from oasst_gateway.fleet import run_fleet
from oasst_gateway.gateway import running_gateway
from oasst_gateway.model import ServedModel, load_model
from oasst_gateway.reloading import WatchedFiles, reload_when_asked_or_changed
from oasst_gateway.settings import FAILPOINTS, GatewaySettings, read_settings, unread_variables

__all__ = ["main"]

logger = logging.getLogger(__name__)

_EXIT_FAILED = 1
_EXIT_BAD_OPTION = 2


def main(arguments: Sequence[str] = sys.argv[1:]) -> int:
    """Serves until SIGTERM or SIGINT; the process's exit code."""
    try:
        settings = read_settings(arguments)
        model = _load_model(settings) if settings.processes == 1 else None
    except StartError as error:
        print(f"oasst_gateway: {error}", file=sys.stderr)
        return _EXIT_BAD_OPTION
    log_to_stderr(level=settings.log_level, log_format=settings.log_format)
    for name in unread_variables():
        logger.warning("environment variable is no option name=%s", name)
    # When each series began: a sixth of the page, and nobody reads it.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    if model is None:
        return _run_processes(settings, arguments)
    failpoints.arm(failpoints.parse_failpoints(settings.failpoints, known=FAILPOINTS))
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_serve(settings, model))
    except (StartError, QueueError) as error:
        print(f"oasst_gateway: {error}", file=sys.stderr)
        return _EXIT_FAILED
    except asyncio.CancelledError:
        print("oasst_gateway: asked to stop twice, open chats were cut off", file=sys.stderr)
        return _EXIT_FAILED
    return 0


def _load_model(settings: GatewaySettings) -> ServedModel:
    return load_model(
        settings.model,
        name=settings.model_name,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_new_tokens=settings.max_new_tokens,
        max_choices=settings.max_choices,
    )


def _run_processes(settings: GatewaySettings, arguments: Sequence[str]) -> int:
    try:
        return asyncio.run(run_fleet(settings, arguments))
    except StartError as error:
        print(f"oasst_gateway: {error}", file=sys.stderr)
        return _EXIT_FAILED


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where the platform has it; asyncio's own does the same, slower."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop


async def _serve(settings: GatewaySettings, model: ServedModel) -> None:
    asked_to_stop, asked_to_reload = asyncio.Event(), asyncio.Event()
    serving = asyncio.current_task()

    def stop() -> None:
        if asked_to_stop.is_set() and serving is not None:
            serving.cancel()
        asked_to_stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, asked_to_reload.set)

    files = WatchedFiles.of(settings)  # From before they are read first.
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    async with running_gateway(settings, model, registry) as gateway, asyncio.TaskGroup() as group:
        event = {
            "event": "serving",
            "role": "gateway",
            "id": settings.gateway_id,
            "listen": gateway.listen,
            "metrics": gateway.metrics,
        }
        print(json.dumps(event), flush=True)
        reloading = group.create_task(reload_when_asked_or_changed(gateway.reload, asked_to_reload, files))
        await asked_to_stop.wait()
        reloading.cancel()


if __name__ == "__main__":
    sys.exit(main())
