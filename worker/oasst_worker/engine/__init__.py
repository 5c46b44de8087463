"""Decides what each step computes. Standard library only: the tensors live in `oasst_worker.runtime`."""

from oasst_worker.engine.batch import (
    Batch,
    Chunk,
    Computed,
    Executor,
    Launched,
    LookaheadExecutor,
    OutOfDeviceMemoryError,
    Sample,
    Scores,
    TokenLogprob,
)
from oasst_worker.engine.engine import (
    Engine,
    EngineConfig,
    FinishReason,
    ScoreOutput,
    TokenOutput,
    finish_reason,
)
from oasst_worker.engine.limits import StepBudgetError, check_budget
from oasst_worker.engine.params import GenerationParams
from oasst_worker.engine.scoring import ScoringSequence, Target, TargetScore
from oasst_worker.engine.sequence import Sequence

__all__ = [
    "Batch",
    "Chunk",
    "Computed",
    "Engine",
    "EngineConfig",
    "Executor",
    "FinishReason",
    "GenerationParams",
    "Launched",
    "LookaheadExecutor",
    "OutOfDeviceMemoryError",
    "Sample",
    "ScoreOutput",
    "Scores",
    "ScoringSequence",
    "Sequence",
    "StepBudgetError",
    "Target",
    "TargetScore",
    "TokenLogprob",
    "TokenOutput",
    "check_budget",
    "finish_reason",
]
