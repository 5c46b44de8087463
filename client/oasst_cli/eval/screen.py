"""A suite's scores beside what was published."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from oasst_cli.eval.suite import Suite, SuiteScore

__all__ = ["mean", "print_suite"]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def print_suite(console: Console, suite: Suite, scores: Sequence[SuiteScore], *, model: str, limit: int | None) -> None:
    console.print(f"{suite.name}: {model}", style="bold", soft_wrap=True, markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task")
    for heading in ("shots", "documents", "metric", "here", "±", suite.published_by, "difference"):
        table.add_column(heading, justify="right")
    for score in scores:
        table.add_row(
            score.task.name,
            str(score.task.num_fewshot),
            str(score.num_documents),
            score.task.metric.partition(",")[0],
            f"{score.value:.2f}",
            f"{score.standard_error:.2f}",
            f"{score.task.published:.2f}",
            f"{score.value - score.task.published:+.2f}",
        )
    here, published = mean([score.value for score in scores]), mean([score.task.published for score in scores])
    table.add_section()
    table.add_row("average", "", "", "", f"{here:.2f}", "", f"{published:.2f}", f"{here - published:+.2f}")
    console.print(table)
    if limit:
        console.print(f"A trial: only the first {limit} documents of each task.", style="yellow")
    console.print(f"Where this differs from what the {suite.published_by}'s numbers come from:", style="bold")
    for name, difference in [
        *(("all", each) for each in suite.differences),
        *((score.task.name, score.task.difference) for score in scores),
    ]:
        console.print(f"- {name}: {difference}", markup=False)
