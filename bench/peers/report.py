"""What was measured, as Markdown: absolute figures, ours against the best peer, and who is missing."""

from collections.abc import Iterable, Mapping, Sequence

from bench.peers.measure import Cell, Figure, Missing
from bench.turns import paired_ratio

__all__ = ["absolute_table", "best_peer", "missing_list", "ratio_table"]


def absolute_table(figures: Sequence[Figure], names: Mapping[str, str]) -> str:
    """A row for each system, in the order of `names`; a figure that does not count is in brackets."""
    concurrents = sorted({figure.cell.concurrent for figure in figures})
    rows = []
    for shape, dtype in dict.fromkeys((figure.cell.shape, figure.cell.dtype) for figure in figures):
        for system, name in names.items():
            found = {
                figure.cell.concurrent: figure
                for figure in figures
                if (figure.cell.shape, figure.cell.dtype, figure.system) == (shape, dtype, system)
            }
            if found:
                least = min(figure.agreement for figure in found.values())
                cells = [_tokens_per_s(found.get(concurrent)) for concurrent in concurrents]
                rows.append([shape, dtype, name, *cells, f"{least:.0%}" if least in (0, 1) else f"{least:.1%}"])
    return _table(["shape", "dtype", "system", *map(str, concurrents), "agreement"], rows)


def ratio_table(figures: Sequence[Figure], names: Mapping[str, str], ours: str) -> str:
    """Ours against the best peer of each cell, round by round, and which peer that is."""
    concurrents = sorted({figure.cell.concurrent for figure in figures})
    rows = []
    for shape, dtype in dict.fromkeys((figure.cell.shape, figure.cell.dtype) for figure in figures):
        cells = [_ratio(figures, Cell(shape, dtype, concurrent), names, ours) for concurrent in concurrents]
        rows.append([shape, dtype, *cells])
    return _table(["shape", "dtype", *map(str, concurrents)], rows)


def missing_list(missing: Iterable[Missing], names: Mapping[str, str]) -> str:
    lines = [f"- {names[one.system]}, {one.where}: {one.reason}" for one in missing]
    return "\n".join(["Missing:", "", *lines] if lines else ["Nothing is missing."])


def best_peer(figures: Iterable[Figure], cell: Cell, ours: str) -> Figure | None:
    """The fastest of the others whose figure counts."""
    peers = [figure for figure in figures if figure.cell == cell and figure.system != ours and figure.counts]
    return max(peers, key=lambda figure: figure.tokens_per_s, default=None)


def _ratio(figures: Sequence[Figure], cell: Cell, names: Mapping[str, str], ours: str) -> str:
    best = best_peer(figures, cell, ours)
    own = next((figure for figure in figures if figure.cell == cell and figure.system == ours), None)
    if best is None:
        return "no peer"
    if own is None or not own.counts:
        return f"missing, {names[best.system]}"
    return f"{paired_ratio(own.rounds, best.rounds)}, {names[best.system]}"


def _tokens_per_s(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.tokens_per_s:.0f}" if figure.counts else f"({figure.tokens_per_s:.0f})"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
