"""`oasst up`: the whole service on this machine, in the foreground."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from oasst_client import Profile

from oasst_cli.options import DEFAULT_ADDRESS
from oasst_cli.up.checkpoint import NoDemoError, demo_checkpoint
from oasst_cli.up.child import Announcement, die_with_parent
from oasst_cli.up.notices import Notices
from oasst_cli.up.stack import Stack, StackOptions, metrics_variable
from oasst_cli.up.state import StateDirectory, StateInUseError
from oasst_cli.up.supervisor import UNUSABLE_EXIT_CODE, Keeper, ServiceFailedError
from oasst_cli.up.valkey import NoServerError

__all__ = ["chat_options", "up"]

_ANY_PORT = "127.0.0.1:0"
_CONNECTION_VARIABLES = frozenset(["OASST_PROFILE", *(f"OASST_{each.name.upper()}" for each in fields(Profile))])


def up(
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_ID", help="Checkpoint folder or hub id. Default: the demo model.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers, each with the whole model.")] = 1,
    gateways: Annotated[int, typer.Option(min=1, help="Gateways, at the listen port and the ports after it.")] = 1,
    gateway_processes: Annotated[int, typer.Option(min=1, help="Processes of each gateway, sharing its port.")] = 1,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help=f"The first gateway's address; port 0 picks free ones. Default: {DEFAULT_ADDRESS}, "
            "or a free port with --chat.",
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar="OASST_REDIS_URL", help="A running Redis or Valkey. Default: one is started."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keeps queue and logs there. Default: they are removed at the end."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16|float16", help="Type of the workers' weights.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Holds the workers' weights in 8 bits. CPU only.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="What the workers compute on.")] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="auto|none|tensor|layers", help="How each worker's model is split over several devices."),
    ] = None,
    num_ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes of each worker's model, with --split tensor.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Prints one line of JSON once all are serving: addresses, ports, processes.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Opens a chat once all are serving, with preset k50 (greedy for the demo); then stops everything.",
        ),
    ] = False,
) -> None:
    """Run the whole service on this machine.

    The queue, workers and gateways. A process that dies says why and is restarted; one that never starts serving ends
    the run. Ctrl-C stops everything, a second one at once; in its chat it stops the current answer. Workers and
    gateways also read the environment variables OASST_WORKER_... and OASST_GATEWAY_...; `python -m oasst_worker
    --help` and `python -m oasst_gateway --help` list them.
    """
    if chat and as_json:
        raise typer.BadParameter("--json and --chat both want standard output")
    for role, number in (("worker", workers), ("gateway", gateways)):
        if number > 1 and (variable := metrics_variable(role)) in os.environ:
            raise typer.BadParameter(f"{variable} is one address, not {number}: unset it, and each takes a free port")
    host, port = _split_address(listen or (_ANY_PORT if chat else DEFAULT_ADDRESS), gateways)
    try:
        options = StackOptions(
            model=model or str(demo_checkpoint()),
            workers=workers,
            gateways=gateways,
            gateway_processes=gateway_processes,
            host=host,
            port=port,
            redis_url=redis_url,
            state_dir=state_dir,
            dtype=dtype,
            quantize=quantize,
            device=device,
            split=split,
            num_ranks=num_ranks,
        )
    except NoDemoError as error:
        raise typer.BadParameter(str(error)) from error
    opened = _Chat(chat_options(model)) if chat else None
    with Notices() as notices:
        raise typer.Exit(asyncio.run(_supervise(options, notices, as_json=as_json, chat=opened)))


def chat_options(model: str | None) -> tuple[str, ...]:
    """What the chat is opened with. The demo model is made for its most likely words; any other gets a preset."""
    return ("--preset", "k50") if model else ("--temperature", "0")


def _split_address(address: str, gateways: int) -> tuple[str, int]:
    """Host and port; every gateway's port is one."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) + (gateways - 1 if int(port) else 0) > 65535:
        raise typer.BadParameter(f"{address!r} is not HOST:PORT with a port from 0 to 65535", param_hint="--listen")
    return host, int(port)


class _Chat:
    """A chat in this terminal: a process of its own, so that it can be stopped while it reads."""

    def __init__(self, flags: Sequence[str]) -> None:
        self._flags = flags
        # Whether Ctrl-C, which the terminal sends to us as well, is for the chat alone.
        self.owns_ctrl_c: bool = False

    async def run(self, address: str) -> int:
        """Runs it to its end; 0 if it answered everything."""
        command = [sys.executable, "-m", "oasst_cli", "chat", "--address", address, *self._flags]
        # Our own gateways are plain and need no key, whatever service the person's environment speaks of.
        environment = {name: value for name, value in os.environ.items() if name not in _CONNECTION_VARIABLES}
        process = await asyncio.create_subprocess_exec(*command, env=environment, preexec_fn=die_with_parent())
        self.owns_ctrl_c = sys.stdin.isatty()
        try:
            return 1 if await process.wait() else 0
        finally:
            self.owns_ctrl_c = False
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def _supervise(options: StackOptions, notices: Notices, *, as_json: bool, chat: _Chat | None) -> int:
    """Runs the stack until a signal, the end of its chat, or a failure that restarting cannot mend; the exit code."""
    stack = Stack(options, observer=notices)
    run = asyncio.create_task(_run(stack, notices, as_json=as_json, chat=chat))

    def on_signal(number: signal.Signals) -> None:
        if number == signal.SIGINT and chat and chat.owns_ctrl_c:
            return
        if run.cancelling():
            stack.kill()
        else:
            notices.rest()
            notices.say("stopping; Ctrl-C once more stops at once")
            run.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # Under nohup the end of the terminal is not our end.
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    exit_code = 0
    try:
        exit_code = await run
    except* asyncio.CancelledError:
        pass  # A signal asked for it.
    except* (ServiceFailedError, NoServerError, StateInUseError, OSError) as failures:
        failure = _first(failures)
        notices.rest()
        notices.say(f"error: {failure}")
        exit_code = UNUSABLE_EXIT_CODE if isinstance(failure, ServiceFailedError) and failure.is_unusable else 1
    return exit_code


async def _run(stack: Stack, notices: Notices, *, as_json: bool, chat: _Chat | None) -> int:
    """Runs the stack until this is cancelled, or its chat ends; the exit code."""
    notices.wait_for("starting")
    async with stack.running() as state:
        async with asyncio.TaskGroup() as group:
            display = group.create_task(_show_what_is_starting(stack, notices))
            announcements = await stack.wait_until_serving()
            display.cancel()
        notices.rest()
        addresses = [announcement.listen for _, announcement in announcements if announcement.listen]
        if as_json:
            print(json.dumps(_summary(stack, state, announcements)), flush=True)
        if chat:
            return await chat.run(addresses[0])
        notices.say(f"serving at {', '.join(addresses)}; logs in {state.logs}; Ctrl-C stops everything")
        metrics = [announcement.metrics for _, announcement in announcements if announcement.metrics]
        watch = ["oasst top", "--address", addresses[0], *(f"--metrics {each}" for each in metrics)]
        notices.say(f"watch it: {' '.join(watch)}")
        await asyncio.get_running_loop().create_future()  # Until cancelled.
    return 0


async def _show_what_is_starting(stack: Stack, notices: Notices) -> None:
    """Loading a large model takes minutes: what each process said last shows that it goes on."""
    while True:
        await asyncio.sleep(notices.interval_s)
        states = [f"{keeper.service.name} ({keeper.last_words() or 'starting'})" for keeper in stack.starting()]
        if states:
            notices.wait_for(f"waiting for {', '.join(states)}")


def _summary(
    stack: Stack, state: StateDirectory, announcements: list[tuple[Keeper, Announcement]]
) -> dict[str, object]:
    """What scripts need to know of the running stack."""
    return {
        "event": "serving",
        "addresses": [announcement.listen for _, announcement in announcements if announcement.listen],
        "metrics": [announcement.metrics for _, announcement in announcements if announcement.metrics],
        # Ours only: one given by the caller may hold a password, and the caller knows it.
        "redis_url": stack.socket_url,
        "state_dir": str(state.path),
        "processes": [
            {
                "name": keeper.service.name,
                "role": keeper.service.role,
                "id": announcement.id,
                "pid": keeper.pid,
                "listen": announcement.listen,
                "metrics": announcement.metrics,
            }
            for keeper, announcement in announcements
        ],
    }


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    """The first error in a group, however deep."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
