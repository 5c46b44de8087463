"""Guessing ahead: what it gains where text repeats itself, and what it costs where all rows are taken.

*Recorded* runs compute every step of a checkpoint and then take the token of a recorded answer: answers that the
12 B model gave to real prompts. So guesses are as good as they are for real text, and steps cost what they cost here.
*Own* runs take the checkpoint's own greedy answers.
"""

import json
import statistics
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from oasst.prompt import ControlToken
from oasst_worker.engine import Batch, Engine, EngineConfig, GenerationParams, Sample, Sequence
from oasst_worker.model.config import load_config
from oasst_worker.runtime import ModelRunner, RuntimeOptions, build_executor
from rich.table import Table
from tokenizers import Tokenizer

from bench.checkpoints import DEMO
from bench.options import Measured, Options
from bench.turns import Ratio, paired_ratio, take_turns, timed

__all__ = ["SpeculationRow", "measure", "read_chats", "speculation_table"]

_SPECULATE = 8


@dataclass(frozen=True)
class Chat:
    """A prompt and the answer that was recorded."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class SpeculationRow:
    """One load, the medians of the rounds."""

    checkpoint: str
    answers: str
    concurrent: int
    without_s: float
    with_s: float
    gain: Ratio  # Of the first to the second.
    same_tokens: bool | None  # In every round. None where tokens are recorded, whatever the model says.
    tokens_per_step: float  # Of one sequence, with guessing.
    accepted_share: float  # Of tokens guessed.


def read_chats(report: Path, *, sampling: str = "greedy", longest: int = 256) -> list[Chat]:
    """The chats of a sampling report of Open-Assistant, by the demo checkpoint's tokenizer.

    That one cuts words into more tokens than the model's own, so more of them can be guessed.
    """
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompter, end, assistant = (
        tokenizer.token_to_id(token.value)
        for token in (ControlToken.PROMPTER, ControlToken.END_OF_TEXT, ControlToken.ASSISTANT)
    )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    chats = []
    for prompt in json.loads(report.read_text())["prompts"]:
        prompt_ids = [prompter, *encode(prompt["prompt"]), end, assistant]
        for result in prompt["results"]:
            if result["sampling_config"] == sampling:
                chats.append(Chat(prompt_ids, encode(result["outputs"][0])[:longest]))
    return [chat for chat in chats if len(chat.answer_ids) >= longest // 2]


def measure(options: Options) -> Measured:
    if options.answers is None:
        raise SystemExit("speculation is measured on recorded answers: --answers FILE, a report of oasst-model-eval")
    chats = read_chats(options.answers)
    rows = [
        row
        for name, folder in options.checkpoints()
        for row in _measure_checkpoint(name, folder, chats, rounds=options.rounds)
    ]
    return rows, [speculation_table(rows)]


def speculation_table(rows: list[SpeculationRow]) -> Table:
    table = Table(title=f"Guessing up to {_SPECULATE} tokens ahead, fp32: time without it / time with it")
    headings = ("checkpoint", "answers", "concurrent", "gain", "tokens a step", "guesses right", "same tokens")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.checkpoint,
            row.answers,
            str(row.concurrent),
            str(row.gain),
            f"{row.tokens_per_step:.2f}",
            f"{row.accepted_share:.0%}",
            {None: "-", True: "yes", False: "NO"}[row.same_tokens],
        )
    return table


def _measure_checkpoint(name: str, folder: Path, chats: list[Chat], *, rounds: int) -> list[SpeculationRow]:
    """One stream after another, then 8 and 32 at once, by the recorded answers; and one stream by its own."""
    model = load_config(folder)
    runner = build_executor(folder, RuntimeOptions(device="cpu", dtype="float32"))
    recorded = _Recorded(runner, {str(number): chat.answer_ids for number, chat in enumerate(chats)})
    rows = []
    for answers, executor, concurrent, count in (
        ("own", runner, 1, 4),
        ("recorded", recorded, 1, 6),
        ("recorded", recorded, 8, 8),
        ("recorded", recorded, 32, 32),
    ):
        asked = {str(number): chat for number, chat in enumerate(chats[:count])}
        runs = {
            speculate: _Run(executor, EngineConfig(model.eos_token_id, model.max_positions, speculate=speculate))
            for speculate in (0, _SPECULATE)
        }
        turns = take_turns(
            {
                speculate: lambda number, run=run, asked=asked, concurrent=concurrent: timed(
                    lambda: run.generate(asked, concurrent, number)
                )
                for speculate, run in runs.items()
            },
            rounds,
        )
        without_s, with_s = ([took_s for took_s, _ in turns[speculate]] for speculate in (0, _SPECULATE))
        pairs = zip(turns[0], turns[_SPECULATE], strict=True)
        guessing = runs[_SPECULATE]
        rows.append(
            SpeculationRow(
                name,
                answers,
                concurrent,
                statistics.median(without_s),
                statistics.median(with_s),
                paired_ratio(without_s, with_s),
                all(tokens == others for (_, tokens), (_, others) in pairs) if executor is runner else None,
                tokens_per_step=guessing.num_tokens / guessing.num_draws,
                accepted_share=guessing.num_accepted / max(1, guessing.num_drafted),
            )
        )
    return rows


class _Recorded:
    """The executor, at its cost; but each token is the recorded one."""

    def __init__(self, runner: ModelRunner, answers: dict[str, list[int]]) -> None:
        self._runner = runner
        self._answers = answers
        self.num_blocks = runner.num_blocks
        self.block_size = runner.block_size
        self.prefill_tile = runner.prefill_tile
        self.is_position_exact = runner.is_position_exact

    def execute(self, batch: Batch) -> list[Sample]:
        self._runner.execute(batch)
        samples = []
        for chunk in batch.chunks:
            answer, start = self._answers[chunk.sequence.sequence_id], chunk.sequence.num_output_tokens
            samples += [Sample(token_id) for token_id in answer[start : start + chunk.num_draws]]
        return samples


class _Run:
    """An engine, and what it did so far."""

    def __init__(self, executor: ModelRunner | _Recorded, config: EngineConfig) -> None:
        self._engine = Engine(executor, config)
        self.num_tokens = 0
        self.num_draws = 0  # Steps, counted for each sequence apart.

    @property
    def num_drafted(self) -> int:
        return self._engine.num_drafted_tokens

    @property
    def num_accepted(self) -> int:
        return self._engine.num_accepted_tokens

    def generate(self, chats: dict[str, Chat], concurrent: int, number: int) -> dict[str, list[int | None]]:
        """All answers of this round, so many at once."""
        waiting = iter(chats.items())
        tokens: dict[str, list[int | None]] = {}
        for name, chat in islice(waiting, concurrent):
            self._add(name, chat, number)
        while self._engine.has_work():
            outputs = self._engine.step()
            self.num_tokens += len(outputs)
            self.num_draws += len({output.sequence_id for output in outputs})
            for output in outputs:
                tokens.setdefault(output.sequence_id, []).append(output.token_id)
                if output.finish is not None:
                    for name, chat in islice(waiting, 1):
                        self._add(name, chat, number)
        return tokens

    def _add(self, name: str, chat: Chat, number: int) -> None:
        params = GenerationParams(len(chat.answer_ids), temperature=0.0, ignore_eos=True)
        # Salted by the round: no prompt is there already.
        self._engine.add(Sequence(name, chat.prompt_ids, params, salt=f"{number} {name}".encode()))
