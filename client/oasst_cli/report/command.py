"""`oasst report`: makes a sampling report, or tells of reports that are there."""

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from oasst_client import OasstError, Profile, connect, connect_async
from oasst_client._files import write_atomically
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from oasst_cli.options import Address, AsJson, ProfileName, chosen_profile, json_line
from oasst_cli.plotting import PlotError, check_plotting
from oasst_cli.report.analysis import compare_reports, describe_report
from oasst_cli.report.configs import NOPREFIX, SamplingConfig, read_configs
from oasst_cli.report.document import Report, ReportError, read_prompts
from oasst_cli.report.journal import Journal
from oasst_cli.report.sampling import sample_prompts
from oasst_cli.report.screen import draw_comparison, print_agreement, print_statistics

__all__ = ["report"]


def report(
    prompts: Annotated[
        Path | None, typer.Argument(help="The prompts: a JSON Lines file, each line a JSON string.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The report to write.")] = Path("report.json"),
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Sampling configs in the form of oasst-model-eval's config/*.json; without it, its noprefix.json.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Outputs for each prompt and config that samples.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same report.")] = 42,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in progress at a time.")] = 8,
    skip_special_tokens: Annotated[
        bool, typer.Option("--skip-special-tokens", help="Leaves <|endoftext|> and the like out of the outputs.")
    ] = False,
    stats: Annotated[
        Path | None, typer.Option(metavar="REPORT", help="Makes no report; prints the statistics of this one.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="REPORT REPORT", help="Makes no report; prints how much these two agree."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="With --compare: also draws it.")] = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Make or compare sampling reports.

    Answers a file of prompts under several sampling configs, and writes the sampling report of oasst-model-eval. An
    interrupted run continues when it is repeated. Reports wait behind chats in the queue.
    """
    if sum(each is not None for each in (prompts, stats, compare)) != 1:
        raise typer.BadParameter("give PROMPTS to make a report, or --stats, or --compare")
    if plot and not compare:
        raise typer.BadParameter("--plot draws a comparison; give --compare too")
    try:
        if stats:
            _tell_statistics(stats, as_json=as_json)
        elif compare:
            _tell_agreement(compare, plot, as_json=as_json)
        elif prompts:
            if out.exists():
                raise ReportError(f"{out} is there already; remove it or choose another --out")
            texts = read_prompts(prompts)[:limit]
            configs = read_configs(config) if config else NOPREFIX
            args = _args(
                prompts=str(prompts),
                seed=seed,
                n=limit,
                num_samples=num_samples,
                config=str(config) if config else "noprefix",
                skip_special_tokens=skip_special_tokens,
                num_threads=concurrency,
            )
            _make(chosen_profile(address, profile), out, texts, configs, args, as_json=as_json)
    except (OSError, PlotError, ReportError) as error:
        raise typer.BadParameter(str(error)) from error


def _tell_statistics(path: Path, *, as_json: bool) -> None:
    statistics = describe_report(Report.read(path))
    if as_json:
        print(json_line([each.to_json() for each in statistics]))
    else:
        print_statistics(Console(highlight=False), path.name, statistics)


def _tell_agreement(paths: tuple[Path, Path], plot: Path | None, *, as_json: bool) -> None:
    if plot:
        check_plotting()
    first, second = Report.read(paths[0]), Report.read(paths[1])
    agreements = compare_reports(first, second)
    if plot:
        draw_comparison(plot, (paths[0].name, paths[1].name), (first, second), agreements)
    if as_json:
        statistics = {
            str(path): [described.to_json() for described in describe_report(each)]
            for path, each in zip(paths, (first, second), strict=True)
        }
        print(json_line({"agreement": [each.to_json() for each in agreements], "statistics": statistics}))
        return
    console = Console(highlight=False)
    for side, path, each in zip("AB", paths, (first, second), strict=True):
        print_statistics(console, f"{side}: {path}", describe_report(each))
    print_agreement(console, agreements)


def _args(**given: Any) -> dict[str, Any]:
    """The options as the original tool records them, in its order. What has no meaning here is null."""
    originals = (
        *("device", "device_index", "model_name", "mode", "prompts", "report", "seed", "verbose", "n", "num_samples"),
        *("config", "half", "skip_special_tokens", "model_type", "max_input_len", "auth_token", "num_threads"),
    )
    # v2_5 without a prefix is the prompt format that the service uses.
    values = {"mode": "v2_5", "verbose": False, "model_type": "CausalLM", **given}
    return {name: values.get(name) for name in originals}


def _make(
    profile: Profile,
    out: Path,
    prompts: list[str],
    configs: tuple[SamplingConfig, ...],
    args: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """The report is written; what was finished before is not done again."""
    with connect(profile) as client:
        model_name = client.model().name
    args = {**args, "model_name": model_name}
    digest = hashlib.sha256(json.dumps([prompts, [dataclasses.asdict(each) for each in configs]]).encode())
    # How many at a time changes nothing that is made.
    purpose = {**args, "num_threads": None, "sha256": digest.hexdigest()}
    with Journal(out.with_name(f"{out.name}.partial"), purpose) as journal:
        num_kept = len(journal.finished)
        _sample(profile, prompts, configs, journal, args)
        finished = Report(
            model_name=model_name,
            date=datetime.now(UTC).replace(tzinfo=None).isoformat(),
            args=args,
            prompts=tuple(journal.finished[index] for index in range(len(prompts))),
        )
        write_atomically(out, finished.to_json())
        journal.remove()
    if as_json:
        print(json_line({"report": str(out), "num_prompts": len(prompts), "num_from_earlier_run": num_kept}))
    else:
        print_statistics(Console(highlight=False), f"{out}: {len(prompts)} prompts", describe_report(finished))


def _sample(
    profile: Profile,
    prompts: list[str],
    configs: tuple[SamplingConfig, ...],
    journal: Journal,
    args: Mapping[str, Any],
) -> None:
    """Every prompt is in the journal; a bar on standard error shows how far it is."""
    columns = (TextColumn("prompts"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("prompts", total=len(prompts), completed=len(journal.finished))

        async def sample() -> None:
            async with connect_async(profile) as client:
                await sample_prompts(
                    client,
                    prompts,
                    configs,
                    journal,
                    num_samples=args["num_samples"],
                    seed=args["seed"],
                    concurrency=args["num_threads"],
                    skip_control_tokens=args["skip_special_tokens"],
                    on_finished=lambda: progress.advance(bar),
                )

        try:
            asyncio.run(sample())
        except* OasstError as failures:
            failure: BaseException = failures
            while isinstance(failure, BaseExceptionGroup):
                failure = failure.exceptions[0]
            raise failure from None
