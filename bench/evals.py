"""Scoring for evaluations: the harness's model `oasst-grpc` on a whole service, against its own model `hf`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from oasst_cli.eval.model import OasstLM
from rich.table import Table
from tokenizers import Tokenizer

from bench.checkpoints import DEMO, random_prompts
from bench.path import complete_with_demo_tokenizer, running_stack

__all__ = ["EvalsRow", "evals_table", "measure_evals"]

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
    largest_difference: float  # Between two log-likelihoods.
    same_greedy: bool

    @property
    def best_batch_size(self) -> int:
        return min(self.theirs_s, key=lambda size: self.theirs_s[size])

    @property
    def ratio(self) -> float:
        return self.theirs_s[self.best_batch_size] / self.ours_s


def measure_evals(name: str, folder: Path, *, num_requests: int, rounds: int) -> list[EvalsRow]:
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
        systems: dict[Any, Callable[[Requests], Any]] = {
            "ours": lambda requests: ours._loglikelihood_tokens(requests, disable_tqdm=True),
            **{size: with_batches_of(size) for size in _BATCH_SIZES},
        }
        for kind, choices in ((f"{_CHOICES} choices each", _CHOICES), ("all apart", 1)):
            seconds: dict[Any, list[float]] = {}
            differences, flags = [], []
            for round_number in range(rounds + 1):
                # Never the same twice: the worker would use again what it computed before.
                requests = _requests(num_requests, choices, vocab_size, seed=100 * choices + round_number)
                answers = {}
                for system, score in systems.items():
                    start = time.perf_counter()
                    answers[system] = score(requests)
                    seconds.setdefault(system, []).append(time.perf_counter() - start)
                for (logprob, is_greedy), (expected, is_expected) in zip(answers["ours"], answers[1], strict=True):
                    differences.append(abs(logprob - expected))
                    flags.append(is_greedy == is_expected)
            median = {system: statistics.median(times[1:]) for system, times in seconds.items()}  # The first warms up.
            rows.append(EvalsRow(name, kind, num_requests, median.pop("ours"), median, max(differences), all(flags)))
    return rows


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
            f"{row.ratio:.2f}",
            f"{row.largest_difference:.0e}",
            "same" if row.same_greedy else "NOT THE SAME",
        )
    return table


def _requests(number: int, choices: int, vocab_size: int, *, seed: int) -> Requests:
    contexts = random_prompts(number // choices, _CONTEXT_TOKENS, vocab_size, seed=seed)
    continuations = random_prompts(number, _CONTINUATION_TOKENS, vocab_size, seed=seed + 1_000_000)
    return [(None, contexts[index // choices], continuation) for index, continuation in enumerate(continuations)]
