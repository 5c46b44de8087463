"""`oasst bench`: how fast the service is under load."""

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryFile
from typing import Annotated

import typer
from oasst_client import AsyncClient, ChatOptions, Model, Profile, RetryPolicy, connect, connect_async
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from oasst_cli.bench.arrivals import ClosedLoad, Load, OpenLoad
from oasst_cli.bench.driver import run_load
from oasst_cli.bench.measurement import METRICS, Overhead, RequestRecord, Summary, summarize
from oasst_cli.bench.overhead import instant_service
from oasst_cli.bench.plots import draw_plots
from oasst_cli.bench.screen import print_summaries
from oasst_cli.bench.workload import Lengths, PromptFile, RandomPrompts, Workload, WorkloadError
from oasst_cli.exits import Exit
from oasst_cli.options import (
    Address,
    AsJson,
    ModelName,
    Preset,
    ProfileName,
    Temperature,
    check_writable,
    chosen_profile,
    finite,
    given_options,
    json_line,
)
from oasst_cli.plotting import PlotError, check_plotting

__all__ = ["bench"]

# A refusal is part of what is measured.
_NO_RETRY = RetryPolicy(max_attempts=1)
_DEFAULT_LOAD = ClosedLoad(8)
_WARMUP_LOAD = ClosedLoad(4)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured."""

    loads: Sequence[Load]
    num_requests: int
    num_warmup: int
    limits_s: Mapping[str, float]
    options: ChatOptions
    seed: int


def bench(
    rate: Annotated[
        list[float] | None,
        typer.Option(metavar="PER_S", help="Requests per second that come by themselves. Repeat it to compare rates."),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            min=0,
            callback=finite,
            help="Of the arrivals: 1 is Poisson, more comes in bursts (gamma), 0 at even gaps.",
        ),
    ] = 1.0,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Instead of a rate: requests at a time, each followed by the next. [default: 8]"),
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests that are measured, for each load.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each load that are not measured.")] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='JSON Lines: strings, {"prompt": ...} or {"messages": [...]}, drawn at random.'
        ),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(metavar="LENGTHS", help="Of random prompts: 128, 64-256, or 128~32 (mean~deviation).")
    ] = "128",
    output_tokens: Annotated[
        str | None,
        typer.Option(metavar="LENGTHS", help="Of answers, exactly. [default: 64; with --prompts the model's own end]"),
    ] = None,
    shared_prefix: Annotated[
        int, typer.Option(min=0, metavar="TOKENS", help="Random tokens that all random prompts begin with.")
    ] = 0,
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=SECONDS", help=f"What a good request keeps: {', '.join(METRICS)}. Repeatable."),
    ] = None,
    preset: Preset = None,
    temperature: Temperature = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed sends the same requests at the same times.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Writes everything there is about each request, as JSON.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draws PNGs there.")] = None,
    overhead: Annotated[
        bool,
        typer.Option("--overhead", help="Measures the tool: the same load on a service that answers at once."),
    ] = False,
    model: ModelName = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Measure the service under load.

    Latencies, throughput and goodput. Latencies count from when a request was due. The exit code is 1 if a request
    failed.
    """
    if rate and concurrency:
        raise typer.BadParameter("give --rate or --concurrency, not both")
    if prompts and shared_prefix:
        raise typer.BadParameter("--shared-prefix is for random prompts; leave out --prompts")
    if not all(0 < each < math.inf for each in rate or ()):
        raise typer.BadParameter("must be above 0 and finite", param_hint="--rate")
    if out:
        check_writable(out)
    if plots:
        _make_folder(plots)
    # Each load once: a load is known by its name.
    loads: list[Load] = [OpenLoad(each, burstiness) for each in dict.fromkeys(rate or ())]
    loads += [ClosedLoad(each) for each in dict.fromkeys(concurrency or ())]
    options = given_options(
        model=model, preset=preset, temperature=temperature, top_k=None, top_p=None, max_new_tokens=None, seed=None
    )
    plan = _Plan(loads or [_DEFAULT_LOAD], num_requests, warmup, _limits(slo or ()), options, seed)
    try:
        if plots:
            check_plotting()
        prompt_lengths, output_lengths = Lengths.parse(prompt_tokens), Lengths.parse(output_tokens or "64")
        file = PromptFile.read(prompts, output_lengths if output_tokens else None) if prompts else None
    except (PlotError, WorkloadError) as error:
        raise typer.BadParameter(str(error)) from error
    with instant_service() if overhead else nullcontext(chosen_profile(address, profile)) as reached:
        with connect(reached) as client:
            served = client.model("" if overhead else model or "")
        workload = file or RandomPrompts(served, prompt_lengths, output_lengths, shared_prefix, seed)
        summaries, records = _measure(reached, plan, workload)
    # Told first: files may fail, for example on a full disk.
    console = Console(highlight=False)
    if as_json:
        print(json_line([summary.to_json() for summary in summaries]), flush=True)
    else:
        print_summaries(console, summaries, limits_s=plan.limits_s)
    if out:
        out.write_text(json_line(_document(served, summaries, records)), encoding="utf-8")
    title = "the load generator itself" if overhead else f"{served.name} at {reached.address}"
    for path in draw_plots(plots, title, summaries, records) if plots else ():
        if not as_json:
            console.print(f"drawn: {path}", soft_wrap=True)
    if any(summary.errors for summary in summaries):
        raise typer.Exit(Exit.FAILED)


def _make_folder(plots: Path) -> None:
    """The folder is there, and files can be made in it: asked before the work whose pictures it is to hold.

    Raises:
        BadParameter: it cannot be made, or they cannot.
    """
    try:
        plots.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=plots):
            pass
    except OSError as error:
        raise typer.BadParameter(f"{plots} cannot be written: {error.strerror}", param_hint="--plots") from error


def _limits(given: Sequence[str]) -> dict[str, float]:
    """Metric -> seconds, of options such as `ttft=0.5`."""
    limits_s = {}
    for text in given:
        metric, _, seconds = text.partition("=")
        try:
            limits_s[metric] = float(seconds)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not METRIC=SECONDS", param_hint="--slo") from None
        if metric not in METRICS:
            raise typer.BadParameter(f"{metric!r} is none of {', '.join(METRICS)}", param_hint="--slo")
    return limits_s


def _measure(profile: Profile, plan: _Plan, workload: Workload) -> tuple[list[Summary], dict[str, list[RequestRecord]]]:
    """Every load in turn; a bar on standard error shows how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    summaries: list[Summary] = []
    records: dict[str, list[RequestRecord]] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        async def measure() -> None:
            async with connect_async(profile, retry=_NO_RETRY) as client:
                for load in plan.loads:
                    records[load.name], own = await _measure_load(client, load, plan, workload, progress)
                    summaries.append(summarize(load, records[load.name], limits_s=plan.limits_s, overhead=own))

        asyncio.run(measure())
    return summaries, records


async def _measure_load(
    client: AsyncClient, load: Load, plan: _Plan, workload: Workload, progress: Progress
) -> tuple[list[RequestRecord], Overhead]:
    """One load, after its warm-up. Requests are drawn before the first is sent."""
    random = Random(plan.seed)
    requests = [workload.draw(random) for _ in range(plan.num_warmup + plan.num_requests)]
    warmup, measured = requests[: plan.num_warmup], requests[plan.num_warmup :]
    bar = progress.add_task(f"{load.name}, warming up", total=len(requests))

    def advance(_: RequestRecord) -> None:
        progress.advance(bar)

    await run_load(client, _WARMUP_LOAD, warmup, plan.options, random=random, on_record=advance)
    progress.update(bar, description=load.name)
    return await run_load(client, load, measured, plan.options, random=random, on_record=advance)


def _document(
    model: Model, summaries: Sequence[Summary], records: Mapping[str, Sequence[RequestRecord]]
) -> dict[str, object]:
    return {
        "model": model.name,
        "loads": [
            {**summary.to_json(), "requests": [dataclasses.asdict(each) for each in records[summary.name]]}
            for summary in summaries
        ],
    }
