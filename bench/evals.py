"""Scoring for evaluations: the harness's model `oasst-grpc` on a whole service, against its own model `hf`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lm_eval.models.huggingface import HFLM
from oasst_cli.eval.model import OasstLM
from rich.table import Table
from tokenizers import Tokenizer

from bench.batch_sizes import BatchSizes, compare_batch_sizes
from bench.checkpoints import DEMO, complete_with_demo_tokenizer, random_prompts
from bench.options import Measured, Options
from bench.services import running_stack

__all__ = ["EvalsRow", "evals_table", "measure"]

# Requests to score, as many as a checkpoint does in seconds.
_NUM_REQUESTS = {"demo": 64, "160m": 16}
_CONTEXT_TOKENS = 256
_CONTINUATION_TOKENS = 8
_CHOICES = 4

# As the harness passes them on: its texts, context, continuation.
Requests = list[tuple[None, list[int], list[int]]]
# Log-likelihoods, and whether the continuation is the likeliest.
Scores = list[tuple[float, bool]]


@dataclass(frozen=True)
class EvalsRow:
    """One checkpoint and kind of requests."""

    checkpoint: str
    requests: str
    num_requests: int
    sizes: BatchSizes
    largest_difference: float  # Between two log-likelihoods.
    same_greedy: bool


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
            f"{row.sizes.ours_s:.2f} s",
            f"{row.sizes.best_s:.2f} s",
            str(row.sizes.best),
            str(row.sizes.ratio),
            f"{row.largest_difference:.0e}",
            "same" if row.same_greedy else "NOT THE SAME",
        )
    return table


def _measure_checkpoint(name: str, folder: Path, *, num_requests: int, rounds: int) -> list[EvalsRow]:
    """Requests that share their context by fours, as multiple choices do, and requests that share nothing."""
    complete_with_demo_tokenizer(folder)
    vocab_size = Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab_size()
    peer = HFLM(str(folder), tokenizer=str(DEMO), device="cpu", dtype="float32")

    def theirs(requests: Requests, batch_size: int) -> Scores:
        peer.batch_size_per_gpu = batch_size
        return peer._loglikelihood_tokens(requests, disable_tqdm=True)

    rows = []
    with running_stack(folder) as stack:
        ours = partial(OasstLM(stack["addresses"][0])._loglikelihood_tokens, disable_tqdm=True)
        for kind, choices in ((f"{_CHOICES} choices each", _CHOICES), ("all apart", 1)):

            def ask(number: int, choices: int = choices) -> Requests:
                return _requests(num_requests, choices, vocab_size, seed=100 * choices + 1 + number)

            sizes, answers = compare_batch_sizes(ours, theirs, ask, rounds)
            pairs = [pair for of_both in answers for pair in zip(*of_both, strict=True)]
            rows.append(
                EvalsRow(
                    name,
                    kind,
                    num_requests,
                    sizes,
                    max(abs(logprob - expected) for (logprob, _), (expected, _) in pairs),
                    all(is_greedy == is_expected for (_, is_greedy), (_, is_expected) in pairs),
                )
            )
    return rows


def _requests(number: int, choices: int, vocab_size: int, *, seed: int) -> Requests:
    contexts = random_prompts(number // choices, _CONTEXT_TOKENS, vocab_size, seed=seed)
    continuations = random_prompts(number, _CONTINUATION_TOKENS, vocab_size, seed=seed + 1_000_000)
    return [(None, contexts[index // choices], continuation) for index, continuation in enumerate(continuations)]
