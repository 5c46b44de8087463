"""Systems take turns at the same prompts; what each generated is compared before its time counts."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.peers.asking import Answer, PeerError, PeerProcess
from bench.turns import turns

__all__ = ["Cell", "Figure", "Missing", "agreement", "measure_cell"]

Tokens = list[list[int]]

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Cell:
    """What the systems are compared at."""

    shape: str
    dtype: str
    concurrent: int


@dataclass(frozen=True)
class Figure:
    """One system at one cell."""

    cell: Cell
    system: str
    tokens_per_s: float  # Generated tokens, prefill included; the median of the rounds.
    rounds: list[float]
    cpu_s: float  # Processor time of a round, all threads; the median.
    agreement: float  # With the reference's fp32 tokens; see `agreement`.

    @property
    def counts(self) -> bool:
        """Another fp32 result would be other work. Fewer bits may choose other tokens, and do as much work."""
        return self.cell.dtype != "fp32" or self.agreement == 1.0


@dataclass(frozen=True)
class Missing:
    """A system that has no figure, and why."""

    system: str
    where: str  # "everywhere", a dtype, or a shape and a dtype
    reason: str


def agreement(tokens: Tokens, reference: Tokens) -> float:
    """Share of tokens that come before a sequence's first difference from the reference, 0 to 1.

    Tokens after a difference have another prompt and say nothing.
    """
    same = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        differences = (place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        same += next(differences, len(theirs))
    return same / sum(map(len, reference))


def measure_cell(
    cell: Cell, systems: Mapping[str, PeerProcess], prompts: Tokens, reference: Tokens, *, rounds: int
) -> tuple[list[Figure], list[Missing]]:
    """Every system answers once in each round, another one first each time. One that fails is out from then on."""
    new_tokens = len(reference[0])
    answers: dict[str, list[Answer]] = {system: [] for system in systems}
    failed: dict[str, str] = {}
    for number, system in turns(list(systems), rounds):
        if system in failed:
            continue
        try:
            if number < 0:
                systems[system].ask(prompts, min(WARM_UP_TOKENS, new_tokens))
            else:
                answers[system].append(systems[system].ask(prompts, new_tokens))
        except PeerError as error:
            failed[system] = str(error)
    figures = [_figure(cell, system, answers[system], reference) for system in systems if system not in failed]
    where = f"{cell.shape} {cell.dtype}, from {cell.concurrent} concurrent on"
    return figures, [Missing(system, where, reason) for system, reason in failed.items()]


def _figure(cell: Cell, system: str, answers: Sequence[Answer], reference: Tokens) -> Figure:
    generated = sum(map(len, reference))
    rounds = [generated / answer.seconds for answer in answers]
    return Figure(
        cell,
        system,
        statistics.median(rounds),
        rounds,
        statistics.median(answer.cpu_seconds for answer in answers),
        min(agreement(answer.tokens, reference) for answer in answers),
    )
