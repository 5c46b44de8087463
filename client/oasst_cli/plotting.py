"""How our plots look, and that they need matplotlib only when one is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "PlotError", "check_plotting", "draw_cdf", "new_figure"]

# Told apart by people who do not see all colours: Okabe and Ito's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#444444", "#F0E442")
_INK, _GRID = "#333333", "#E4E4E4"
_STYLE: Any = {  # matplotlib's own type is a list of all its names.
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.dpi": 150,
}


class PlotError(Exception):
    """A plot cannot be drawn; says what to do."""


def check_plotting() -> None:
    """Plots can be drawn: asked before the work whose result they show.

    Raises:
        PlotError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401  # Heavy, and not in the extra `cli`.
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install '.[plot]' in a clone of oasst-serve") from error


@contextmanager
def new_figure(path: Path, title: str, *, rows: int, columns: int, width: float = 5.2) -> Iterator[Any]:
    """The grid of axes (an array, so that it can be flattened) of a figure that is written to `path` at the end.

    `width` is that of each, in inches.
    """
    check_plotting()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        # Not through pyplot: nothing is shown, and no figure is kept alive behind our back.
        figure = Figure(figsize=(width * columns, 3.6 * rows), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_cdf(axes: "Axes", values: list[float], *, label: str, colour: str, linestyle: str = "-") -> None:
    """The part of the values that is at most x, as a line over x."""
    if values:
        axes.ecdf(values, label=label, color=colour, linestyle=linestyle)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
