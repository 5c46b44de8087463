"""Scoring for evaluations: the harness's model `oasst-grpc` on a whole service, against its own model `hf`."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from oasst_cli.eval.model import OasstLM
from rich.table import Table
from tokenizers import Tokenizer

from bench.checkpoints import DEMO, complete_with_demo_tokenizer, random_prompts
from bench.options import Measured, Options
from bench.services import running_stack
from bench.turns import Ratio, paired_ratio, take_turns, timed

__all__ = ["EvalsRow", "evals_table", "measure"]

# Requests to score, as many as a checkpoint does in seconds.
_NUM_REQUESTS = {"demo": 64, "160m": 16}
_CONTEXT_TOKENS = 256
_CONTINUATION_TOKENS = 8
_CHOICES = 4
_BATCH_SIZES = (1, 4, 16)

# As the harness passes them on: its texts, context, continuation.
Requests = list[tuple[None, list[int], list[int]]]


@dataclass(frozen=True)
class EvalsRow:
    """Seconds to score the same requests, the medians of the rounds."""

    checkpoint: str
    requests: str
    num_requests: int
    ours_s: float
    theirs_s: dict[int, float]  # By batch size.
    ratios: dict[int, Ratio]  # Of each of these to ours.
    largest_difference: float  # Between two log-likelihoods.
    same_greedy: bool

    @property
    def best_batch_size(self) -> int:
        return min(self.theirs_s, key=lambda size: self.theirs_s[size])

    @property
    def ratio(self) -> Ratio:
        return self.ratios[self.best_batch_size]


def measure(options: Options) -> Measured:
    rows = [
        row
        for name, folder in options.checkpoints()
        for row in _measure_checkpoint(name, folder, num_requests=_NUM_REQUESTS[name], rounds=options.rounds)
    ]
    return rows, [evals_table(rows)]


def evals_table(rows: list[EvalsRow]) -> Table:
    title = f"Scoring for evaluations: contexts of {_CONTEXT_TOKENS} tokens, continuations of {_CONTINUATION_TOKENS}"
    table = Table(title=title)
    headings = ("checkpoint", "requests", "oasst-grpc", "hf at its best", "batch size", "ratio", "differ by", "greedy")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            f"{row.num_requests}, {row.requests}",
            f"{row.ours_s:.2f} s",
            f"{row.theirs_s[row.best_batch_size]:.2f} s",
            str(row.best_batch_size),
            str(row.ratio),
            f"{row.largest_difference:.0e}",
            "same" if row.same_greedy else "NOT THE SAME",
        )
    return table


def _measure_checkpoint(name: str, folder: Path, *, num_requests: int, rounds: int) -> list[EvalsRow]:
    """Requests that share their context by fours, as multiple choices do, and requests that share nothing."""
    complete_with_demo_tokenizer(folder)
    vocab_size = Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab_size()
    theirs = HFLM(str(folder), tokenizer=str(DEMO), device="cpu", dtype="float32")

    def with_batches_of(size: int) -> Callable[[Requests], Any]:
        def score(requests: Requests) -> Any:
            theirs.batch_size_per_gpu = size
            return theirs._loglikelihood_tokens(requests, disable_tqdm=True)

        return score

    rows = []
    with running_stack(folder) as stack:
        ours = OasstLM(stack["addresses"][0])
        scorers: dict[int | None, Callable[[Requests], Any]] = {
            None: lambda requests: ours._loglikelihood_tokens(requests, disable_tqdm=True),
            **{size: with_batches_of(size) for size in _BATCH_SIZES},
        }
        for kind, choices in ((f"{_CHOICES} choices each", _CHOICES), ("all apart", 1)):
            # Never the same twice: the worker would use again what it computed before.
            requests = {
                number: _requests(num_requests, choices, vocab_size, seed=100 * choices + 1 + number)
                for number in range(-1, rounds)
            }
            turns = take_turns(
                {
                    system: lambda number, score=score, requests=requests: timed(lambda: score(requests[number]))
                    for system, score in scorers.items()
                },
                rounds,
            )
            seconds = {system: [took_s for took_s, _ in of_one] for system, of_one in turns.items()}
            pairs = [
                pair
                for (_, answers), (_, expected) in zip(turns[None], turns[1], strict=True)
                for pair in zip(answers, expected, strict=True)
            ]
            rows.append(
                EvalsRow(
                    name,
                    kind,
                    num_requests,
                    statistics.median(seconds[None]),
                    {size: statistics.median(seconds[size]) for size in _BATCH_SIZES},
                    {size: paired_ratio(seconds[size], seconds[None]) for size in _BATCH_SIZES},
                    max(abs(logprob - expected) for (logprob, _), (expected, _) in pairs),
                    all(is_greedy == is_expected for (_, is_greedy), (_, is_expected) in pairs),
                )
            )
    return rows


def _requests(number: int, choices: int, vocab_size: int, *, seed: int) -> Requests:
    contexts = random_prompts(number // choices, _CONTEXT_TOKENS, vocab_size, seed=seed)
    continuations = random_prompts(number, _CONTINUATION_TOKENS, vocab_size, seed=seed + 1_000_000)
    return [(None, contexts[index // choices], continuation) for index, continuation in enumerate(continuations)]
