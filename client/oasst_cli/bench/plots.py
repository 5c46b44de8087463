"""What a benchmark measured, as pictures."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from oasst_cli.bench.measurement import METRICS, RequestRecord, Summary, latencies_of, tokens_per_s_over_time
from oasst_cli.plotting import COLOURS, draw_cdf, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_plots"]

# Shorter ones show single steps of the engine, not its throughput.
_MIN_WINDOW_S = 1.0
_MAX_WINDOWS = 60
_MS_PER_S = 1000


def draw_plots(
    folder: Path, title: str, summaries: Sequence[Summary], records: Mapping[str, Sequence[RequestRecord]]
) -> list[Path]:
    """The files drawn: distributions, tokens over time, and over several loads the latencies.

    `records` are those of each load, by its name.
    """
    cdfs, throughput, over_load = (
        folder / f"{name}.png" for name in ("latency-cdf", "tokens-over-time", "latency-over-load")
    )
    _draw_cdfs(cdfs, title, records)
    _draw_throughput(throughput, title, records)
    if len(summaries) == 1:
        return [cdfs, throughput]
    _draw_over_load(over_load, title, summaries)
    return [cdfs, throughput, over_load]


def _draw_cdfs(path: Path, title: str, records: Mapping[str, Sequence[RequestRecord]]) -> None:
    with new_figure(path, title, rows=2, columns=2) as grid:
        for axes, metric in zip(grid.flat, ("ttft", "itl", "tpot", "e2e"), strict=True):
            for (name, each), colour in zip(records.items(), cycle(COLOURS), strict=False):
                finished = [record for record in each if not record.error]
                milliseconds = [value * _MS_PER_S for value in latencies_of(metric, finished)]
                draw_cdf(axes, milliseconds, label=name, colour=colour)
            axes.set(title=METRICS[metric].capitalize(), xlabel="milliseconds", xlim=(0, None))
        _name_loads(grid[0][0], records)


def _draw_throughput(path: Path, title: str, records: Mapping[str, Sequence[RequestRecord]]) -> None:
    with new_figure(path, title, rows=1, columns=1, width=9) as grid:
        axes = grid[0][0]
        for (name, each), colour in zip(records.items(), cycle(COLOURS), strict=False):
            window_s = max(_MIN_WINDOW_S, max(record.ended_s for record in each) / _MAX_WINDOWS)
            times_s, rates = zip(*tokens_per_s_over_time(each, window_s=window_s), strict=True)
            axes.plot(times_s, rates, label=name, color=colour)
            axes.fill_between(times_s, rates, color=colour, alpha=0.12)
        axes.set(title="Output tokens per second", xlabel="seconds", xlim=(0, None), ylim=(0, None))
        _name_loads(axes, records)


def _draw_over_load(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    levels = [each.level for each in summaries]
    with new_figure(path, title, rows=1, columns=3) as grid:
        for axes, metric in zip(grid[0], ("ttft", "itl"), strict=False):
            for percentile, colour in zip(("p50", "p90", "p99"), COLOURS, strict=False):
                values = [getattr(each.latencies_s.get(metric), percentile, float("nan")) for each in summaries]
                milliseconds = [value * _MS_PER_S for value in values]
                axes.plot(levels, milliseconds, marker="o", label=percentile, color=colour)
            axes.set(title=METRICS[metric].capitalize(), ylabel="milliseconds")
            axes.legend(loc="upper left")
        rates = grid[0][2]
        rates.plot(levels, [each.output_tokens_per_s for each in summaries], marker="o", color=COLOURS[0])
        rates.set(title="Output tokens per second")
        for axes in grid[0]:
            axes.set(xlabel=summaries[0].level_unit, xlim=(0, None), ylim=(0, None))


def _name_loads(axes: "Axes", records: Mapping[str, Sequence[RequestRecord]]) -> None:
    if len(records) > 1:
        axes.legend(loc="best")
