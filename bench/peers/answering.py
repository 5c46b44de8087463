"""The answering end of a measured system: a process that holds a model and generates when asked.

A question and its answer are one line of JSON each. Programs run in environments that hold little, so this module needs
the standard library alone.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Generate", "Setup", "converted", "serve"]

# Prompts, number of tokens to generate for each -> what was generated, greedily and past any end-of-text token.
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True)
class Setup:
    """What a system is started with."""

    checkpoint: str  # A folder with a GPT-NeoX checkpoint in fp32 and a tokenizer.
    converted: str  # Where the system keeps that checkpoint in its own format, once converted.
    dtype: str  # fp32, bf16, int8
    threads: int
    max_sequences: int
    max_tokens: int  # Of one sequence, its prompt included.

    @classmethod
    def from_json(cls, text: str) -> "Setup":
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@contextlib.contextmanager
def converted(target: Path) -> Iterator[Path]:
    """`target` appears whole or not at all: the block writes to the path it gets, which then takes that name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"unfinished-{os.getpid()}-{target.name}")
    yield unfinished
    unfinished.rename(target)


def serve(load: Callable[[Setup], Generate]) -> None:
    """Answers until the questions end. The first answer says that the model is loaded, or why it is not."""
    answers = _take_stdout()

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        generate = load(Setup.from_json(sys.argv[1]))
        answer({"ready": True})
        for line in sys.stdin:
            question = json.loads(line)
            start, start_cpu = time.perf_counter(), time.process_time()
            tokens = generate(question["prompts"], question["new_tokens"])
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            answer({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


def _take_stdout() -> Any:
    """Answers go where stdout went; what libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers
