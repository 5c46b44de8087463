"""Decides what each step computes. Standard library only: the tensors live in `oasst_worker.runtime`."""

from oasst_worker.engine.batch import Batch, Chunk, Executor, OutOfDeviceMemoryError, Sample, TokenLogprob
from oasst_worker.engine.engine import Engine, EngineConfig, FinishReason, TokenOutput, finish_reason
from oasst_worker.engine.params import GenerationParams
from oasst_worker.engine.sequence import Sequence

__all__ = [
    "Batch",
    "Chunk",
    "Engine",
    "EngineConfig",
    "Executor",
    "FinishReason",
    "GenerationParams",
    "OutOfDeviceMemoryError",
    "Sample",
    "Sequence",
    "TokenLogprob",
    "TokenOutput",
    "finish_reason",
]
