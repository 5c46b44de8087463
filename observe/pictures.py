"""Dashboards as pictures, drawn from Prometheus's answers with matplotlib: what Grafana shows, without its looks."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from observe.dashboards import Dashboard, Panel
from observe.prometheus import Series

__all__ = ["Answers", "draw"]

# What a panel shows: (legend, series).
Answers = list[tuple[str, Series]]

_COLUMNS = 3
_FORMATTERS = {
    "s": EngFormatter(unit="s"),
    "bytes": EngFormatter(unit="B"),
    "percentunit": PercentFormatter(1.0),
    "reqps": FuncFormatter(lambda value, _: f"{value:g}/s"),
    "ops": FuncFormatter(lambda value, _: f"{value:g}/s"),
    "short": EngFormatter(sep=""),
}


def draw(dashboard: Dashboard, answers: Mapping[str, Answers], *, start_s: float, path: Path) -> None:
    """`path` holds the dashboard's picture; `answers` are by the panels' titles, times seconds since `start_s`."""
    rows = -(-len(dashboard.panels) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(15, 3.1 * rows), squeeze=False)
    figure.suptitle(dashboard.title)
    for axes in grid.flat[len(dashboard.panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, dashboard.panels, strict=False):
        _draw_panel(axes, panel, answers[panel.title], start_s)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def _draw_panel(axes: Axes, panel: Panel, lines: Answers, start_s: float) -> None:
    for legend, series in lines:
        axes.plot([time_s - start_s for time_s in series.times_s], series.values, label=legend, linewidth=1.2)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_FORMATTERS[panel.unit])
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=7, loc="upper left")
