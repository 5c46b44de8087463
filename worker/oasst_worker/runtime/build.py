"""From a checkpoint folder to an executor on this machine's device."""

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.linear import Linear, build_linear, build_quantized_linear
from oasst_worker.model.neox import NeoX
from oasst_worker.model.weights import load_weights
from oasst_worker.runtime.runner import ModelRunner

__all__ = ["RuntimeOptions", "UnsupportedOptionError", "build_executor"]

_log = logging.getLogger(__name__)

# Of the machine's memory on a CPU, of what the weights leave on a GPU.
_CPU_CACHE_SHARE = 0.25
_GPU_CACHE_SHARE = 0.85

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UnsupportedOptionError(ValueError):
    """The options cannot work on this machine or with this checkpoint; the message says what to change."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantize: str | None = None  # int8: weights of the linear layers, on a CPU.
    threads: int | None = None  # None is PyTorch's choice: one per core.
    kv_tokens: int | None = None  # Positions of KV cache; None is what memory allows.
    max_sequences: int = 32


def build_executor(folder: Path, options: RuntimeOptions, *, banned_token_ids: Iterable[int] = ()) -> ModelRunner:
    """The checkpoint's model is in memory and computes.

    Raises:
        CheckpointError: the folder holds no checkpoint that can be served.
        UnsupportedOptionError: an option does not fit this machine or this checkpoint.
    """
    config = load_config(folder)
    device = _choose_device(options.device)
    dtype = _choose_dtype(options.dtype, device, config)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    make_linear = _choose_linear(options.quantize, device)
    model = NeoX(config, load_weights(folder, config, dtype=dtype, device=device), make_linear)
    if device.type == "cpu" and not model.is_row_exact():
        _log.warning("on this processor a sequence's numbers depend on its batch: %s is not row-exact", dtype)
    kv_tokens = options.kv_tokens or _default_kv_tokens(config, device, dtype, options.max_sequences)
    if kv_tokens < BLOCK_SIZE:
        raise UnsupportedOptionError(f"--kv-tokens must be at least {BLOCK_SIZE}, not {kv_tokens}")
    return ModelRunner(model, num_blocks=kv_tokens // BLOCK_SIZE, banned_token_ids=banned_token_ids)


def _choose_device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UnsupportedOptionError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name)


def _choose_dtype(name: str, device: torch.device, config: NeoXConfig) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else config.dtype
    if name == "float16" and device.type == "cpu":
        raise UnsupportedOptionError("--dtype float16 needs a GPU; use float32 or bfloat16 on a CPU")
    return _DTYPES[name]


def _choose_linear(quantize: str | None, device: torch.device) -> Callable[..., Linear]:
    if quantize is None:
        return build_linear
    if device.type != "cpu":
        raise UnsupportedOptionError(f"--quantize {quantize} needs --device cpu; leave it out on {device.type}")
    return build_quantized_linear


def _default_kv_tokens(config: NeoXConfig, device: torch.device, dtype: torch.dtype, max_sequences: int) -> int:
    """Every sequence at its longest, or as many positions as the device's memory allows."""
    bytes_per_token = 2 * config.num_layers * config.hidden_size * dtype.itemsize
    if device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(device)[0] * _GPU_CACHE_SHARE)
    else:
        memory = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_CACHE_SHARE)
    return min(max_sequences * config.max_positions, memory // bytes_per_token)
