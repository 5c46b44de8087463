"""Results of many runs as the fault table."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from faults.mutations import Mutation
from faults.runs import Outcome
from faults.table import Result, Row

__all__ = ["MutationSummary", "Summary", "mutation_table", "table_of"]


@dataclass
class Summary:
    """All runs of one row."""

    row: Row
    results: list[Result] = field(default_factory=list)
    # Seed and what broke.
    failures: list[tuple[int, str]] = field(default_factory=list)
    # Runs that were repeated since their fault met too few streams.
    num_missed: int = 0

    def add(self, outcome: Outcome) -> None:
        """One more run is over."""
        self.num_missed += outcome.num_missed
        if outcome.result is None:
            self.failures.append((outcome.run.seed, outcome.defect))
        else:
            self.results.append(outcome.result)

    @property
    def verdict(self) -> str:
        runs = len(self.results) + len(self.failures)
        if not runs:
            return "not run on this machine"
        repeated = f" ({self.num_missed} met nothing)" if self.num_missed else ""
        if not self.failures:
            return f"held {runs}/{runs}{repeated}"
        broken = ", ".join(str(seed) for seed, _ in sorted(self.failures))
        return f"**held {len(self.results)}/{runs}**, broken with seed {broken}{repeated}"

    @property
    def evidence(self) -> str:
        """Each figure's total if it counts, its median and largest value if it has a unit of time."""
        figures: dict[str, list[float]] = defaultdict(list)
        for result in self.results:
            for name, value in result.evidence.items():
                figures[name].append(value)
        return "; ".join(_figure(name, sorted(values)) for name, values in figures.items())


@dataclass
class MutationSummary:
    """What a row said without its guard."""

    mutation: Mutation
    num_runs: int = 0
    # Of the run that broke.
    defect: str = ""

    @property
    def survived(self) -> bool:
        """Nothing has noticed so far that the guard is gone."""
        return not self.defect


def mutation_table(mutants: Sequence[MutationSummary]) -> str:
    """The table in Markdown."""
    lines = ["| taken out | row | runs until it broke | what it said |", "|---|---|---:|---|"]
    for mutant in mutants:
        said = mutant.defect or "**nothing**"
        lines.append(f"| {mutant.mutation.guard} | {mutant.mutation.row.number} | {mutant.num_runs} | {said} |")
    return "\n".join(lines)


def _figure(name: str, values: Sequence[float]) -> str:
    if name.endswith(" s"):
        quantity, _, unit = name.rpartition(" ")
        return f"{quantity} {statistics.median(values):.2f} {unit}, at most {values[-1]:.2f} {unit}"
    return f"{name} {sum(values):g}"


def table_of(summaries: Sequence[Summary]) -> str:
    """The table in Markdown."""
    lines = [
        "| # | fault | promise | runs | streams | tokens | evidence |",
        "|---|---|---|---|---:|---:|---|",
    ]
    for summary in summaries:
        row = summary.row
        streams = sum(result.num_streams for result in summary.results)
        tokens = sum(result.num_tokens for result in summary.results)
        cells = (row.number, row.fault, row.promise, summary.verdict, f"{streams:,}", f"{tokens:,}", summary.evidence)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
