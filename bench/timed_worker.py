"""A worker without tensors, whose steps take a given time: `python -m bench.timed_worker STEP_S OPTIONS`.

All of `python -m oasst_worker` but the model: it draws the same few words again and again.
"""

import sys
import time

from oasst_worker.__main__ import main
from oasst_worker.detokenizer import Detokenizer
from oasst_worker.engine import Engine, EngineConfig
from oasst_worker.intake import Intake, ModelFacts
from oasst_worker.served_model import ServedModel
from oasst_worker.settings import WorkerSettings
from tokenizers import Tokenizer

from bench.checkpoints import DEMO
from bench.executors import EmptyExecutor
from bench.services import MODEL

_FIRST_WORD = 1000
_WORDS = 100
_POSITIONS = 2048


def load_model(settings: WorkerSettings, step_s: float) -> ServedModel:
    """Every batch takes as long as every other."""
    executor = EmptyExecutor(
        settings.max_sequences * _POSITIONS // EmptyExecutor.block_size,
        spend=lambda _: time.sleep(step_s),
        draw=lambda chunk: _FIRST_WORD + chunk.end % _WORDS,
    )
    tokens = {"max_sequences": settings.max_sequences, "step_tokens": settings.step_tokens}
    engine = Engine(executor, EngineConfig(eos_token_id=0, max_positions=_POSITIONS, **tokens))
    facts = ModelFacts(
        vocab_size=_POSITIONS, max_positions=_POSITIONS, kv_tokens=engine.kv_tokens_total, eos_token_id=0
    )
    return ServedModel(MODEL, engine, Intake(Detokenizer(Tokenizer.from_file(str(DEMO / "tokenizer.json"))), facts))


if __name__ == "__main__":
    step_s, *options = sys.argv[1:]
    sys.exit(main(["--model", MODEL, *options], load=lambda settings: load_model(settings, float(step_s))))
