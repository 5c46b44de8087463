"""What a benchmark measured, as tables."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from oasst_cli.bench.measurement import METRICS, Distribution, Summary

__all__ = ["print_summaries"]

_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def print_summaries(console: Console, summaries: Sequence[Summary], *, limits_s: Mapping[str, float]) -> None:
    """One load in full; of several, first each in full, then all side by side."""
    for summary in summaries:
        console.print(_full(summary, limits_s))
    if len(summaries) > 1:
        console.print(_side_by_side(summaries))


def _full(summary: Summary, limits_s: Mapping[str, float]) -> RenderableType:
    latencies = _table("milliseconds", *_COLUMNS)
    for metric, title in METRICS.items():
        if distribution := summary.latencies_s.get(metric):
            latencies.add_row(title, *(_milliseconds(getattr(distribution, column)) for column in _COLUMNS))
    lines = [
        f"[bold]{summary.name}[/bold]: {summary.num_finished} requests finished in {summary.duration_s:.1f} s, "
        f"[bold]{summary.requests_per_s:.2f}[/bold] requests/s, "
        f"[bold]{summary.output_tokens_per_s:.1f}[/bold] output tokens/s "
        f"({summary.prompt_tokens} tokens in, {summary.cached_tokens} of them cached; {summary.output_tokens} out)"
    ]
    if limits_s:
        wanted = ", ".join(f"{metric} <= {limit_s * 1000:g} ms" for metric, limit_s in limits_s.items())
        lines.append(f"goodput: {summary.goodput_per_s:.2f} requests/s, {summary.num_good} requests kept {wanted}")
    if summary.errors:
        told = ", ".join(f"{count} {error}" for error, count in summary.errors.items())
        lines.append(f"[red]failed: {told}[/red]")
    own = summary.overhead
    lines.append(
        f"[dim]the tool itself: {own.cpu_share:.0%} of a core, {own.cpu_s_per_token * 1e6:.0f} us per token; "
        f"99 of 100 times it sent within {_milliseconds(own.send_delay_p99_s)} ms and read within "
        f"{_milliseconds(own.loop_delay_p99_s)} ms[/dim]"
    )
    return Group(*lines, latencies)


def _side_by_side(summaries: Sequence[Summary]) -> Table:
    names = ("ttft p50", "ttft p99", "itl p50", "itl p99", "e2e p50", "e2e p99")
    table = _table("load", "req/s", "tok/s", "good/s", *names, "failed")
    for each in summaries:
        values = [_value(each.latencies_s.get(metric), percentile) for metric, percentile in map(str.split, names)]
        table.add_row(
            each.name,
            f"{each.requests_per_s:.2f}",
            f"{each.output_tokens_per_s:.1f}",
            f"{each.goodput_per_s:.2f}",
            *values,
            str(sum(each.errors.values())),
        )
    return table


def _value(distribution: Distribution | None, percentile: str) -> str:
    return _milliseconds(getattr(distribution, percentile)) if distribution else "-"


def _milliseconds(seconds: float) -> str:
    """Three digits that matter.

    >>> [_milliseconds(each) for each in (0.0012345, 0.012345, 0.12345, 1.2345)]
    ['1.23', '12.3', '123', '1234']
    """
    milliseconds = seconds * 1000
    return f"{milliseconds:.{max(0, 3 - len(str(int(milliseconds))))}f}"


def _table(*columns: str) -> Table:
    """Names to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table
