"""A worker process on the verifiable model: all of `python -m oasst_worker` but the tensors.

    python verifiable_worker.py --step-s 0.01 --ledger FILE -- OPTIONS OF THE WORKER

The ledger gets a line for each step before it is computed: what was computed when, and for whom.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from oasst_worker.__main__ import main
from oasst_worker.detokenizer import Detokenizer
from oasst_worker.engine import (
    Batch,
    Chunk,
    Engine,
    EngineConfig,
    OutOfDeviceMemoryError,
    Sample,
    Scores,
    Sequence,
    Target,
    TargetScore,
)
from oasst_worker.intake import Intake, ModelFacts
from oasst_worker.served_model import ServedModel
from oasst_worker.settings import WorkerSettings
from tokenizers import Tokenizer

from faults.verifiable import MODEL, MODEL_FOLDER, Prompt, Script, foretell_score, next_token, words

MAX_POSITIONS = 2048
VOCAB_SIZE = 2048
EOS = 0


class Ledger:
    """What was computed, in a file that survives its writer."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def enter(self, batch: Batch) -> None:
        chunks = [[chunk.sequence.sequence_id, chunk.start, chunk.end, _index_drawn(chunk)] for chunk in batch.chunks]
        os.write(self._file, json.dumps({"s": time.monotonic(), "chunks": chunks}).encode() + b"\n")

    def is_first(self, event: str) -> bool:
        """Whether no worker has asked for this event before."""
        try:
            os.close(os.open(self.folder / f"once-{event}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


def _index_drawn(chunk: Chunk) -> int | None:
    return chunk.sequence.num_output_tokens if chunk.draws else None


class VerifiableExecutor:
    """Draws and scores the tokens as `verifiable` foretells, in steps that take as long as they are told to."""

    block_size = 16
    prefill_tile = 16
    is_position_exact = True

    def __init__(self, *, num_blocks: int, step_s: float, slow_s: float, ledger: Ledger | None) -> None:
        self.num_blocks = num_blocks
        self._step_s = step_s
        self._slow_s = slow_s
        self._ledger = ledger
        self._has_memory = True

    def execute(self, batch: Batch) -> list[Sample | Scores]:
        if not self._has_memory:
            self.run_out_of_memory()
        if self._ledger is not None:
            self._ledger.enter(batch)
            for chunk in batch.chunks:
                self._play(chunk, self._ledger)
        _pause(self._step_s)
        return [_result(chunk) for chunk in batch.chunks if chunk.draws or chunk.targets]

    def _play(self, chunk: Chunk, ledger: Ledger) -> None:
        """Whatever the prompt's script has for this chunk happens."""
        prompt = Prompt.read(chunk.sequence.prompt_ids)
        if prompt.script is Script.SLOW_PREFILL and chunk.end <= chunk.sequence.num_prompt_tokens:
            _pause(self._slow_s)
        if _index_drawn(chunk) != prompt.at:
            return
        if prompt.script is Script.POISON:
            signal.raise_signal(signal.SIGKILL)
        if prompt.script in _ONCE and ledger.is_first(chunk.sequence.sequence_id.replace("/", "-")):
            _ONCE[prompt.script](self)

    def run_out_of_memory(self) -> None:
        """As `oasst_worker.runtime` does when the device has no memory."""
        raise OutOfDeviceMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def lose_memory(self) -> None:
        """No batch is small enough from now on."""
        self._has_memory = False
        self.run_out_of_memory()


def _pause(seconds: float) -> None:
    """As `time.sleep`, which under libfaketime does not end when the clock was set back."""
    select.select([], [], [], seconds)


def _lose_device() -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


_ONCE: dict[Script, Callable[[VerifiableExecutor], None]] = {
    Script.OUT_OF_MEMORY: VerifiableExecutor.run_out_of_memory,
    Script.NO_MEMORY: VerifiableExecutor.lose_memory,
    Script.DEVICE_LOST: lambda _: _lose_device(),
    Script.HANG: lambda _: time.sleep(3600),
}


def _result(chunk: Chunk) -> Sample | Scores:
    if chunk.targets:
        return Scores([_score(chunk.sequence, target) for target in chunk.targets])
    return _draw(chunk.sequence)


def _score(sequence: Sequence, target: Target) -> TargetScore:
    before = sequence.token_ids[: target.position + 1]
    return TargetScore(*foretell_score([*before, target.token_id], target.position + 1))


def _draw(sequence: Sequence) -> Sample:
    prompt = Prompt.read(sequence.prompt_ids)
    if prompt.script is Script.NOT_FINITE and sequence.num_output_tokens == prompt.at:
        return Sample(None)
    params = sequence.params
    return Sample(next_token(sequence.prompt_ids, sequence.output_ids, seed=params.seed, choice=params.choice))


def make_loader(options: argparse.Namespace) -> Callable[[WorkerSettings], ServedModel]:
    def load(settings: WorkerSettings) -> ServedModel:
        words()  # Before the first step has to wait for it.
        executor = VerifiableExecutor(
            num_blocks=(settings.kv_tokens or 65_536) // VerifiableExecutor.block_size,
            step_s=options.step_s,
            slow_s=options.slow_s,
            ledger=Ledger(options.ledger) if options.ledger else None,
        )
        config = EngineConfig(
            eos_token_id=EOS,
            max_positions=MAX_POSITIONS,
            max_sequences=settings.max_sequences,
            step_tokens=settings.step_tokens,
        )
        engine = Engine(executor, config)
        facts = ModelFacts(
            vocab_size=VOCAB_SIZE, max_positions=MAX_POSITIONS, kv_tokens=engine.kv_tokens_total, eos_token_id=EOS
        )
        detokenizer = Detokenizer(Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json")))
        return ServedModel(MODEL, engine, Intake(detokenizer, facts))

    return load


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--slow-s", type=float, default=1.0)
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("worker", nargs="*")
    options = parser.parse_args()
    sys.exit(main(["--model", MODEL, *options.worker], load=make_loader(options)))
