"""Log-likelihoods through the whole path against a plain transformers loop: same weights, items and scores, fp32."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from oasst_client import Client, ItemScore, ScoreItem
from rich.table import Table
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM

from bench.batch_sizes import BatchSizes, compare_batch_sizes
from bench.checkpoints import complete_with_demo_tokenizer
from bench.options import Measured, Options
from bench.services import running_stack

__all__ = ["ScoringRow", "measure", "score_in_batches", "scoring_table"]

# Of sums over a continuation's tokens.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Task:
    """The shape of an evaluation: how many continuations stand behind each context, and how long they are."""

    name: str
    num_contexts: int
    num_choices: int
    tokens: tuple[int, int]


TASKS = (
    Task("4 answers of 4 to 12 tokens to a context", 8, 4, (4, 12)),  # HellaSwag, ARC.
    Task("4 answers of one token to a context", 16, 4, (1, 1)),  # MMLU.
    Task("1 answer of 4 to 12 tokens to a context", 24, 1, (4, 12)),  # Nothing is shared.
)


@dataclass(frozen=True)
class _Draw:
    """Items of random tokens that the tokenizer knows; to the first context, the first answer is the model's own."""

    task: Task
    model: GPTNeoXForCausalLM
    num_ids: int
    context_tokens: int

    def items(self, seed: int) -> list[ScoreItem]:
        dice, ids = random.Random(f"{self.task.name} {seed}"), range(300, self.num_ids)
        items = []
        for _ in range(self.task.num_contexts):
            context = dice.choices(ids, k=dice.randint(self.context_tokens // 2, self.context_tokens * 3 // 2))
            for _ in range(self.task.num_choices):
                num_tokens = dice.randint(*self.task.tokens)
                answer = dice.choices(ids, k=num_tokens) if items else self._said(context, num_tokens)
                items.append(ScoreItem((*context, *answer), len(context)))
        return items

    def _said(self, context: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([context])
        said = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            suppress_tokens=[*range(self.num_ids, self.model.config.vocab_size)] or None,
            eos_token_id=-1,
            pad_token_id=1,
        )
        return said[0, len(context) :].tolist()


@dataclass(frozen=True)
class ScoringRow:
    """One checkpoint and task."""

    checkpoint: str
    task: str
    num_items: int
    sizes: BatchSizes
    largest_difference: float  # Between two log-likelihoods of an item.


def measure(options: Options) -> Measured:
    rows = [row for name, folder in options.checkpoints() for row in _measure_checkpoint(name, folder, options)]
    return rows, [scoring_table(rows)]


def scoring_table(rows: list[ScoringRow]) -> Table:
    table = Table(title="Scoring, whole path against transformers at its best batch size: items per second")
    for heading in ("checkpoint", "items", "oasst-serve", "transformers", "its batch", "ratio", "largest difference"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            row.task,
            f"{row.num_items / row.sizes.ours_s:.1f}",
            f"{row.num_items / row.sizes.best_s:.1f}",
            str(row.sizes.best),
            str(row.sizes.ratio),
            f"{row.largest_difference:.0e}",
        )
    return table


@torch.inference_mode()
def score_in_batches(model: GPTNeoXForCausalLM, items: Sequence[ScoreItem], batch_size: int) -> list[ItemScore]:
    """As lm-evaluation-harness does with a model of transformers: longest first, padded on the right.

    Items that differ in their last token alone take one row, which is more than the harness shares.
    """
    indices = defaultdict(list)
    for index, item in enumerate(items):
        indices[item.token_ids[:-1], item.context_length].append(index)
    rows = sorted(indices, key=lambda row: len(row[0]), reverse=True)
    scores: dict[int, ItemScore] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        fed_ids = [torch.tensor(token_ids) for token_ids, _ in batch]
        logits = model(torch.nn.utils.rnn.pad_sequence(fed_ids, batch_first=True), use_cache=False).logits
        for of_row, row in zip(logits, batch, strict=True):
            token_ids, context_length = row
            wanted = of_row[context_length - 1 : len(token_ids)]
            logprobs, best = wanted.log_softmax(-1), wanted.argmax(-1)
            for index in indices[row]:
                targets = torch.tensor(items[index].token_ids[context_length:])
                logprob = logprobs.gather(1, targets[:, None]).sum().item()
                scores[index] = ItemScore(logprob, bool((best == targets).all()), ())
    return [scores[index] for index in range(len(items))]


def _measure_checkpoint(name: str, folder: Path, options: Options) -> list[ScoringRow]:
    """`folder` needs no tokenizer of its own. Contexts have half to one and a half times the prompt's tokens.

    Raises:
        RuntimeError: the two sides do not give the same scores, so that times would compare nothing.
    """
    complete_with_demo_tokenizer(folder)
    num_ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with running_stack(folder) as stack, Client(stack["addresses"][0]) as client:
        draws = (_Draw(task, model, num_ids, options.prompt_tokens) for task in TASKS)
        return [_measure_task(name, draw, client, options.rounds) for draw in draws]


def _measure_task(name: str, draw: _Draw, client: Client, rounds: int) -> ScoringRow:
    sizes, pairs = compare_batch_sizes(client.score, partial(score_in_batches, draw.model), draw.items, rounds)
    return ScoringRow(
        name,
        draw.task.name,
        draw.task.num_contexts * draw.task.num_choices,
        sizes,
        largest_difference=max(_largest_difference(ours, theirs) for ours, theirs in pairs),
    )


def _largest_difference(ours: Sequence[ItemScore], theirs: Sequence[ItemScore]) -> float:
    if [score.is_greedy for score in ours] != [score.is_greedy for score in theirs]:
        raise RuntimeError("the two sides do not call the same items greedy")
    difference = max(abs(one.logprob - other.logprob) for one, other in zip(ours, theirs, strict=True))
    if difference > _TOLERANCE:
        raise RuntimeError(f"the scores of an item differ by {difference:.1e}: {_TOLERANCE:.0e} is allowed")
    return difference
