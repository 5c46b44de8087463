"""Reports on the screen and as plots."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from oasst_cli.plotting import COLOURS, draw_cdf, new_figure
from oasst_cli.report.analysis import Agreement, OutputStatistics, describe_report, output_lengths
from oasst_cli.report.document import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_comparison", "print_agreement", "print_statistics"]

# Of a report's name in a plot.
_NAME_END_CHARS = 18
_BAR_WIDTH = 0.38
_SIDES = (-_BAR_WIDTH / 2, _BAR_WIDTH / 2)


def print_statistics(console: Console, title: str, statistics: Sequence[OutputStatistics]) -> None:
    console.print(title, style="bold", soft_wrap=True, markup=False)
    table = _table("config", "outputs", "end-of-text", "rate", "mean chars", "median", "longest")
    for each in statistics:
        table.add_row(
            each.config,
            str(each.num_outputs),
            str(each.num_ended),
            f"{each.ended_rate:.1%}",
            f"{each.mean_chars:.0f}",
            f"{each.median_chars:.0f}",
            str(each.max_chars),
        )
    console.print(table)


def print_agreement(console: Console, agreements: Sequence[Agreement]) -> None:
    console.print("Agreement; where outputs differ, the median character at which they begin to", style="bold")
    table = _table("config", "pairs", "equal", "rate", "shared beginning", "differs at")
    for each in agreements:
        where = each.median_divergence
        table.add_row(
            each.config,
            str(each.num_pairs),
            str(each.num_equal),
            f"{each.equal_rate:.1%}",
            f"{each.mean_shared_prefix:.1%}",
            "-" if where is None else f"{where:.0f}",
        )
    console.print(table)


def draw_comparison(
    path: Path, names: tuple[str, str], reports: tuple[Report, Report], agreements: Sequence[Agreement]
) -> None:
    """Agreement, first differences, ends and lengths of two reports, A and B, as one picture."""
    configs = [each.config for each in agreements]
    labels = [f"{side}: {_shortened(name)}" for side, name in zip("AB", names, strict=True)]
    statistics = [{each.config: each for each in describe_report(report)} for report in reports]
    with new_figure(path, " and ".join(labels), rows=2, columns=2) as grid:
        agreement, divergence, ended, lengths = grid.flat
        agreement.set_title("Agreement")
        _draw_pairs(
            agreement,
            configs,
            {
                "equal outputs": [each.equal_rate for each in agreements],
                "shared beginning": [each.mean_shared_prefix for each in agreements],
            },
        )
        ended.set_title("Ended by the model")
        _draw_pairs(
            ended,
            configs,
            {
                label: [described[name].ended_rate for name in configs]
                for label, described in zip(labels, statistics, strict=True)
            },
        )
        divergence.set(title="First difference, of the outputs that differ", xlabel="character")
        _draw_divergences(divergence, agreements)
        lengths.set(title="Characters: range, middle half and median")
        _draw_lengths(lengths, configs, reports)


def _draw_divergences(axes: "Axes", agreements: Sequence[Agreement]) -> None:
    for each, colour in zip(agreements, cycle(COLOURS), strict=False):
        draw_cdf(axes, [float(at) for at in each.first_divergences], label=each.config, colour=colour)
    if any(each.first_divergences for each in agreements):
        axes.legend(loc="lower right")
    else:
        axes.text(0.5, 0.5, "no output differs", transform=axes.transAxes, ha="center", va="center")
        axes.set_xticks([])


def _draw_pairs(axes: "Axes", configs: Sequence[str], rates: Mapping[str, Sequence[float]]) -> None:
    """Two bars for each config, side by side."""
    for offset, colour, (label, values) in zip(_SIDES, COLOURS, rates.items(), strict=False):
        places = [place + offset for place in range(len(configs))]
        axes.bar(places, values, width=_BAR_WIDTH, color=colour, label=label)
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    _name_places(axes, configs)
    axes.legend(loc="upper left", ncols=2)


def _draw_lengths(axes: "Axes", configs: Sequence[str], reports: tuple[Report, Report]) -> None:
    """Two boxes for each config, side by side, in the colours of the bars above."""
    for offset, colour, report in zip(_SIDES, COLOURS, reports, strict=False):
        axes.boxplot(
            [output_lengths(report.outputs_of(name)) for name in configs],
            positions=[place + offset for place in range(len(configs))],
            widths=_BAR_WIDTH * 0.8,
            patch_artist=True,
            whis=(0, 100),
            boxprops={"facecolor": colour, "edgecolor": colour, "alpha": 0.6},
            medianprops={"color": "black", "linewidth": 2},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
    axes.set_ylim(bottom=0)
    _name_places(axes, configs)


def _name_places(axes: "Axes", configs: Sequence[str]) -> None:
    axes.set_xticks(range(len(configs)), configs)
    axes.grid(visible=False, axis="x")


def _shortened(name: str) -> str:
    """Both ends of a long name: those of reports that one tool wrote begin alike.

    >>> _shortened("2023-04-03_sampling_noprefix_lottery_of_a_model.json")
    '2023-04-03_samplin...ry_of_a_model.json'
    """
    if len(name) <= 2 * _NAME_END_CHARS + 3:
        return name
    return f"{name[:_NAME_END_CHARS]}...{name[-_NAME_END_CHARS:]}"


def _table(*columns: str) -> Table:
    """Names to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table
