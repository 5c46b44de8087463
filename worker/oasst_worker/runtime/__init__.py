"""Computes what the engine decides: tensors, KV cache and sampling on a device."""

from oasst_worker.runtime.build import (
    RuntimeOptions,
    UnsupportedOptionError,
    build_executor,
    least_prefill_tile,
)
from oasst_worker.runtime.runner import ModelRunner

__all__ = ["ModelRunner", "RuntimeOptions", "UnsupportedOptionError", "build_executor", "least_prefill_tile"]
