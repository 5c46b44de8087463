"""The figures as a picture: a row for each dtype, a column for each number of concurrent sequences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from bench.peers.measure import Figure

matplotlib.use("Agg")  # Before pyplot, which would look for a screen.
from matplotlib import pyplot

__all__ = ["plot"]

OURS_COLOUR, PEER_COLOUR = "#1f77b4", "#c0c4cc"


def plot(figures: Sequence[Figure], names: Mapping[str, str], ours: str, shape: str, file: Path) -> None:
    """Bars of generated tokens per second for one shape, written to `file`; what does not count is left out."""
    shown = [figure for figure in figures if figure.cell.shape == shape and figure.counts]
    dtypes = list(dict.fromkeys(figure.cell.dtype for figure in shown))
    concurrents = sorted({figure.cell.concurrent for figure in shown})
    picture, axes = pyplot.subplots(
        len(dtypes), len(concurrents), figsize=(4 * len(concurrents), 2.4 * len(dtypes)), squeeze=False
    )
    for row, dtype in enumerate(dtypes):
        for column, concurrent in enumerate(concurrents):
            bars = [f for f in shown if (f.cell.dtype, f.cell.concurrent) == (dtype, concurrent)]
            _draw(axes[row][column], sorted(bars, key=lambda figure: figure.tokens_per_s), names, ours)
            axes[row][column].set_title(f"{dtype}, {concurrent} concurrent", fontsize=9)
    picture.suptitle(f"Generated tokens per second, {shape} GPT-NeoX shape, prefill included")
    picture.tight_layout()
    picture.savefig(file, dpi=120)
    pyplot.close(picture)


def _draw(axis: matplotlib.axes.Axes, figures: Sequence[Figure], names: Mapping[str, str], ours: str) -> None:
    bars = axis.barh(
        [names[figure.system] for figure in figures],
        [figure.tokens_per_s for figure in figures],
        color=[OURS_COLOUR if figure.system == ours else PEER_COLOUR for figure in figures],
    )
    axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axis.tick_params(labelsize=7)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)
