"""What a report's outputs look like, and how much two reports agree. Pure."""

import statistics
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from oasst_cli.report.document import END_OF_TEXT, Report, ReportError

__all__ = ["Agreement", "OutputStatistics", "compare_reports", "describe_report", "output_lengths"]


@dataclass(frozen=True, slots=True)
class OutputStatistics:
    """The outputs of one config. Lengths are characters, end-of-text left out."""

    config: str
    num_outputs: int
    # Outputs that the model ended itself.
    num_ended: int
    mean_chars: float
    median_chars: float
    max_chars: int

    @property
    def ended_rate(self) -> float:
        return self.num_ended / self.num_outputs

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ended_rate": self.ended_rate}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How much two reports agree under one config, output by output of the prompts they share."""

    config: str
    num_pairs: int
    num_equal: int
    # Of the pairs that differ: where, in characters from the start.
    first_divergences: tuple[int, ...]
    # Mean over all pairs: the part of the longer output that both begin with.
    mean_shared_prefix: float

    @property
    def equal_rate(self) -> float:
        return self.num_equal / self.num_pairs

    @property
    def median_divergence(self) -> float | None:
        """None where nothing differs."""
        return statistics.median(self.first_divergences) if self.first_divergences else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "equal_rate": self.equal_rate}


def describe_report(report: Report) -> list[OutputStatistics]:
    """Statistics of every config that has outputs."""
    return [_describe(name, outputs) for name in report.config_names if (outputs := report.outputs_of(name))]


def compare_reports(first: Report, second: Report) -> list[Agreement]:
    """Agreement under every config of both, over the prompts of both. Equal prompts are matched by their text.

    Raises:
        ReportError: they share no prompt, or no config.
    """
    shared = [name for name in first.config_names if name in second.config_names]
    others = {each.prompt: each for each in second.prompts}
    agreements = []
    for name in shared:
        pairs = [
            pair
            for prompt in first.prompts
            if prompt.prompt in others
            for mine in prompt.results
            for theirs in others[prompt.prompt].results
            if mine.sampling_config == theirs.sampling_config == name
            for pair in zip(mine.outputs, theirs.outputs, strict=False)
        ]
        if pairs:
            agreements.append(_agreement(name, pairs))
    if not agreements:
        raise ReportError("the two reports share no prompt with the same sampling config")
    return agreements


def output_lengths(outputs: list[str]) -> list[int]:
    """Characters of each output, end-of-text left out."""
    return [len(output.removesuffix(END_OF_TEXT)) for output in outputs]


def _describe(config: str, outputs: list[str]) -> OutputStatistics:
    lengths = output_lengths(outputs)
    return OutputStatistics(
        config=config,
        num_outputs=len(outputs),
        num_ended=sum(output.endswith(END_OF_TEXT) for output in outputs),
        mean_chars=statistics.fmean(lengths),
        median_chars=statistics.median(lengths),
        max_chars=max(lengths),
    )


def _agreement(config: str, pairs: list[tuple[str, str]]) -> Agreement:
    shared = [sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False))) for pair in pairs]
    longer = [max(map(len, pair)) for pair in pairs]
    return Agreement(
        config=config,
        num_pairs=len(pairs),
        num_equal=sum(mine == theirs for mine, theirs in pairs),
        first_divergences=tuple(length for length, (mine, theirs) in zip(shared, pairs, strict=True) if mine != theirs),
        mean_shared_prefix=statistics.fmean(
            length / of if of else 1.0 for length, of in zip(shared, longer, strict=True)
        ),
    )
