"""What bf16 and 8 bits cost, in weights and KV cache: how far greedy answers and probabilities leave those of fp32."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from oasst_worker.engine import Batch, Chunk, EngineConfig, GenerationParams, Sequence
from oasst_worker.model.attention import FP8, PlainAttention
from oasst_worker.model.config import load_config
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from oasst_worker.runtime.tensors import make_rows
from rich.table import Table
from tokenizers import Tokenizer

from bench.checkpoints import DEMO, random_prompts
from bench.greedy import generate_greedily
from bench.options import Measured, Options

__all__ = ["AgreementRow", "agreement_table", "measure", "measure_agreement"]

_MOST_NEW_TOKENS = 64

_DIALOGUES = DEMO.parent / "dialogues.jsonl"
_KV_TOKENS = 16384


def _served(folder: Path, dtype: str, quantize: str | None = None, kv_dtype: str = "auto") -> ModelRunner:
    return build_executor(folder, RuntimeOptions("cpu", dtype, kv_dtype, quantize=quantize, kv_tokens=_KV_TOKENS))


def _with_fp8_cache(folder: Path, dtype: torch.dtype) -> ModelRunner:
    """As on a GPU, by the plain path: on a CPU the worker does not offer it."""
    config = load_config(folder)
    weights = load_weights(folder, config, dtype=dtype)
    model = NeoX(config, weights, make_attention=partial(PlainAttention, kv_dtype=FP8))
    return ModelRunner(model, num_blocks=_KV_TOKENS // BLOCK_SIZE)


_VARIANTS: dict[str, Callable[[Path], ModelRunner]] = {
    "bf16": partial(_served, dtype="bfloat16"),
    "int8, fp32 rows": partial(_served, dtype="float32", quantize="int8"),
    "int8, bf16 rows": partial(_served, dtype="bfloat16", quantize="int8"),
    "int8 cache, fp32 rows": partial(_served, dtype="float32", kv_dtype="int8"),
    "int8 cache, bf16 rows": partial(_served, dtype="bfloat16", kv_dtype="int8"),
    "int8 and int8 cache, bf16 rows": partial(_served, dtype="bfloat16", quantize="int8", kv_dtype="int8"),
    "fp8 cache, fp32 rows": partial(_with_fp8_cache, dtype=torch.float32),
    "fp8 cache, bf16 rows": partial(_with_fp8_cache, dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class AgreementRow:
    """One variant against fp32, over the same prompts."""

    checkpoint: str
    variant: str
    prompts: int
    new_tokens: int
    same_tokens: float  # Share of greedy tokens equal to fp32's at their place, each going on from its own.
    same_best: float  # Share of places with the same most likely token, reading fp32's text.
    first_difference: float  # Mean tokens before the first that differs; all of them where none does.
    divergence: float  # Mean Kullback-Leibler divergence from fp32's probabilities, nats, reading fp32's text.


def measure(options: Options) -> Measured:
    """Takes no times, so that one round tells all."""
    new_tokens = min(options.new_tokens, _MOST_NEW_TOKENS)
    rows = [
        row
        for name, folder in options.checkpoints()
        for row in measure_agreement(name, folder, prompt_tokens=options.prompt_tokens, new_tokens=new_tokens)
    ]
    return rows, [agreement_table(rows)]


def measure_agreement(
    name: str, folder: Path, *, prompt_tokens: int, new_tokens: int, count: int = 8
) -> list[AgreementRow]:
    """Every variant's answers to `count` prompts: real questions for the demo, random tokens for random weights."""
    model = load_config(folder)
    prompts = _questions(count) if folder == DEMO else random_prompts(count, prompt_tokens, model.vocab_size)
    config = EngineConfig(model.eos_token_id, model.max_positions, max_sequences=count)
    reference = _served(folder, "float32")
    expected, _ = generate_greedily(reference, config, prompts, new_tokens)
    texts = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
    wanted = _log_probabilities(reference, texts, prompts)
    rows = []
    for variant, build in _VARIANTS.items():
        runner = build(folder)
        answers, _ = generate_greedily(runner, config, prompts, new_tokens)
        given = _log_probabilities(runner, texts, prompts)
        pairs = list(zip(expected, answers, strict=True))
        rows.append(
            AgreementRow(
                name,
                variant,
                count,
                new_tokens,
                sum(a == b for pair in pairs for a, b in zip(*pair, strict=True)) / (count * new_tokens),
                (wanted.argmax(dim=1) == given.argmax(dim=1)).float().mean().item(),
                sum(_equal_at_first(*pair) for pair in pairs) / count,
                (wanted.exp() * (wanted - given)).sum(dim=1).mean().item(),
            )
        )
    return rows


def agreement_table(rows: list[AgreementRow]) -> Table:
    table = Table(title=f"Agreement with fp32: {rows[0].prompts} prompts, {rows[0].new_tokens} greedy tokens each")
    for heading in ("checkpoint", "variant", "same tokens", "same best", "before the first other", "KL, nats"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            row.variant,
            f"{row.same_tokens:.1%}",
            f"{row.same_best:.1%}",
            f"{row.first_difference:.1f}",
            f"{row.divergence:.2e}",
        )
    return table


def _questions(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    with _DIALOGUES.open() as lines:
        dialogues = [json.loads(line) for line in itertools.islice(lines, count)]
    return [
        tokenizer.encode(f"<|prompter|>{dialogue['messages'][0]['content']}<|endoftext|><|assistant|>").ids
        for dialogue in dialogues
    ]


def _log_probabilities(runner: ModelRunner, texts: list[list[int]], prompts: list[list[int]]) -> torch.Tensor:
    """Of every place behind a prompt, [places, vocab]."""
    return torch.cat(
        [
            _logits(runner, text)[len(prompt) - 1 : -1].log_softmax(dim=1)
            for text, prompt in zip(texts, prompts, strict=True)
        ]
    )


def _logits(runner: ModelRunner, token_ids: list[int]) -> torch.Tensor:
    """Behind each token, [tokens, vocab]: an engine tells only what it draws. The runner's cache must be idle."""
    sequence = Sequence("text", token_ids, GenerationParams(max_new_tokens=1))
    sequence.blocks += range(-(-len(token_ids) // BLOCK_SIZE))
    rows = make_rows(Batch((Chunk(sequence, 0, len(token_ids)),)))
    every_row = replace(rows, drawing_rows=range(len(token_ids)))
    return runner.model.forward(every_row.to(runner.device), runner.cache)


def _equal_at_first(expected: list[int], given: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, given, strict=True)))
