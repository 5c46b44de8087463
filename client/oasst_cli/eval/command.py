"""`oasst eval`: how well a served model does, beside what was published for it."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from oasst_cli.eval.errors import HarnessError, TaskError
from oasst_cli.eval.run import check_harness, run_tasks
from oasst_cli.eval.screen import mean, print_suite
from oasst_cli.eval.suite import SUITES, Suite, SuiteScore
from oasst_cli.exits import Exit
from oasst_cli.options import Address, AsJson, ModelName, ProfileName, check_writable, json_line

__all__ = ["evaluate"]


def evaluate(
    suite: Annotated[
        str, typer.Option(metavar="NAME", help=f"Which tasks, with which shots: {', '.join(SUITES)}.")
    ] = "open-llm-leaderboard-v1",
    only: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Only this task of the suite; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first documents of each task: for a trial.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keeps answers there, so that an interrupted run can continue."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also writes the harness's whole output, as JSON.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Answers generated at a time.")] = 32,
    model: ModelName = None,
    address: Address = None,
    profile: ProfileName = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a served model.

    Runs the lm-evaluation-harness and prints its results beside the numbers on the model's card. The harness loads the
    data sets. Evaluation waits behind chats.
    """
    chosen = _chosen(suite, only)
    try:
        check_harness()
    except HarnessError as error:
        raise typer.BadParameter(str(error)) from error
    if out:
        check_writable(out)
    from oasst_cli.eval.model import OasstLM  # The harness is heavy, and not in the extra `cli`.

    served = OasstLM(address, profile, model or "", num_concurrent=concurrency)
    try:
        scores, told = run_tasks(chosen.tasks, served, limit=limit, cache=cache)
    except (HarnessError, TaskError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(Exit.UNUSABLE if isinstance(error, TaskError) else Exit.FAILED) from error
    if as_json:
        print(json_line(_summary(chosen, scores, served.model_name, limit, told)))
    else:
        print_suite(Console(highlight=False), chosen, scores, model=served.model_name, limit=limit)
    if out:
        out.write_text(json.dumps(told, indent=2, default=str) + "\n", encoding="utf-8")


def _chosen(name: str, only: list[str] | None) -> Suite:
    """The suite of this name, with all of its tasks or only some.

    Raises:
        BadParameter: there is no such suite, or no such task in it.
    """
    if name not in SUITES:
        raise typer.BadParameter(f"there is no suite {name!r}; there is {', '.join(SUITES)}")
    suite = SUITES[name]
    tasks = {task.name.lower(): task for task in suite.tasks}
    wanted = [each.lower() for each in only or tasks]
    if unknown := [each for each in wanted if each not in tasks]:
        raise typer.BadParameter(f"{suite.name} has no task {unknown[0]!r}; it has {', '.join(tasks)}")
    return dataclasses.replace(suite, tasks=tuple(task for key, task in tasks.items() if key in wanted))


def _summary(
    suite: Suite, scores: Sequence[SuiteScore], model: str, limit: int | None, told: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "suite": suite.name,
        "model": model,
        "harness_version": told["lm_eval_version"],
        "limit": limit,
        "tasks": [
            {
                "task": score.task.name,
                "num_fewshot": score.task.num_fewshot,
                "metric": score.task.metric,
                "num_documents": score.num_documents,
                "value": score.value,
                "standard_error": None if math.isnan(score.standard_error) else score.standard_error,
                "published": score.task.published,
                "difference": score.task.difference,
            }
            for score in scores
        ],
        "average": mean([score.value for score in scores]),
        "published_average": mean([score.task.published for score in scores]),
        "differences": suite.differences,
    }
