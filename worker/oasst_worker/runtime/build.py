"""From a checkpoint folder to an executor on this machine's device."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from oasst_worker.model.attention import (
    FP8,
    INT8,
    PREFILL_TILE,
    Attention,
    attention_kernel,
    build_attention,
    kv_bytes,
)
from oasst_worker.model.compiled_draw import DRAW_KERNEL
from oasst_worker.model.config import NeoXConfig, load_config
from oasst_worker.model.inputs import BLOCK_SIZE
from oasst_worker.model.kernels import QUERIES, start_compiling
from oasst_worker.model.linear import (
    Linear,
    build_linear,
    build_quantized_linear,
    build_row_exact_linear,
    linear_kernel,
)
from oasst_worker.model.neox import NeoX
from oasst_worker.model.ranks import ALONE, ConnectedRanks, ExchangeError, Ranks, Share, connect_ranks
from oasst_worker.model.weights import LayerPlace, NeoXWeights, Progress, open_weights
from oasst_worker.runtime.memory import usable_bytes
from oasst_worker.runtime.placement import (
    DeviceMemory,
    UnplacedError,
    describe_places,
    find_devices,
    place_layers,
    spare_kv_tokens,
    weight_bytes,
)
from oasst_worker.runtime.ranks import LostRankError, RankProcesses, SplitModel
from oasst_worker.runtime.runner import ModelRunner
from oasst_worker.runtime.split import Machine, UnsupportedSplitError, choose_split

__all__ = [
    "RuntimeOptions",
    "UnsupportedOptionError",
    "build_executor",
    "build_layered",
    "least_prefill_tile",
    "open_share",
]

_log = logging.getLogger(__name__)

# By default a KV cache takes so much of what the weights leave on a GPU.
_GPU_CACHE_SHARE = 0.85
# On a CPU the smaller of these: of the machine's memory, and of what the weights leave. The rest is for a step's rows
# and for other processes.
_CPU_CACHE_SHARE = 0.25
_CPU_SPARE_SHARE = 0.5

# A KV cache is of use from so many sequences at their longest on: four times as many chats of some five hundred tokens,
# all that a worker generates at once by default.
_USEFUL_SEQUENCES = 8

# For whom a GPU is too small.
_HOW_TO_FIT = "use more GPUs, or let the CPU compute some layers by --split layers --offload cpu"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UnsupportedOptionError(ValueError):
    """The options cannot work on this machine or with this checkpoint; the message says what to change."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    kv_dtype: str = "auto"  # auto, fp8 on a GPU, int8 on a CPU: of the KV cache; auto is `dtype`.
    quantize: str | None = None  # int8: weights of the linear layers, on a CPU.
    batch_invariant: bool = False  # On a GPU too, a sequence's bits do not depend on its batch.
    threads: int | None = None  # None is PyTorch's choice: one per core.
    kv_tokens: int | None = None  # Positions of KV cache; None is what memory allows.
    max_sequences: int = 32
    split: str = "auto"  # auto, none, tensor, layers
    num_ranks: int | None = None  # Processes of one model; None is one for each GPU, or one.
    # Bytes of each device, by its name, that weights and KV cache may take; none is what is free.
    device_memory: Mapping[str, int] = field(default_factory=dict)
    offload: str = "none"  # none, cpu, disk: where layers may go that the devices have no room for.


def least_prefill_tile(options: RuntimeOptions) -> int:
    """What `ModelRunner.prefill_tile` is at least, known before anything is loaded."""
    return QUERIES if _choose_device(options.device).type == "cpu" else PREFILL_TILE


def build_executor(
    folder: Path,
    options: RuntimeOptions,
    *,
    banned_token_ids: Iterable[int] = (),
    progress: Progress | None = None,
) -> ModelRunner:
    """The checkpoint's model is in memory and computes. `progress` is told how much of it, or of a share, is read.

    Raises:
        CheckpointError: the folder holds no checkpoint that can be served.
        UnsupportedOptionError: an option does not fit this machine or this checkpoint.
    """
    try:
        return _build_executor(folder, options, banned_token_ids, progress)
    except torch.OutOfMemoryError as error:
        raise UnsupportedOptionError(
            f"a GPU has no memory for the model and its KV cache: give fewer --kv-tokens, {_HOW_TO_FIT}: {error}"
        ) from error


def _build_executor(
    folder: Path, options: RuntimeOptions, banned_token_ids: Iterable[int], progress: Progress | None
) -> ModelRunner:
    config = load_config(folder)
    device = _choose_device(options.device)
    dtype = _choose_dtype(options.dtype, device, config)
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(num_gpus)]
    has_placement = bool(options.device_memory) or options.offload != "none"
    cache_bytes = _wanted_cache_bytes(config, _choose_kv_dtype(options.kv_dtype, dtype, device), options)
    machine = Machine(gpus, weight_bytes(config, dtype), cache_bytes, has_placement)
    try:
        split = choose_split(config, options.split, options.num_ranks, machine)
    except UnsupportedSplitError as error:
        raise UnsupportedOptionError(str(error)) from error
    _log.info("split=%s ranks=%d: %s", split.kind, split.num_ranks, split.reason)
    if split.kind == "layers":
        try:
            devices = find_devices(device, options.device_memory, options.offload)
        except UnplacedError as error:
            raise UnsupportedOptionError(str(error)) from error
        return build_layered(folder, options, devices, banned_token_ids=banned_token_ids, progress=progress)
    if has_placement:
        raise UnsupportedOptionError(
            f"--device-memory and --offload are for --split layers; leave them out with --split {split.kind}"
        )
    if split.num_ranks == 1:
        model = open_share(folder, options, Share(), progress).load(ALONE)
        return _make_runner(model, options, usable_bytes(model.device), banned_token_ids)
    threads = options.threads or torch.get_num_threads()
    of_rank = replace(options, threads=max(1, threads // split.num_ranks))
    processes = RankProcesses(split.num_ranks, {"folder": str(folder), "options": asdict(of_rank)})
    try:
        split_model, memory = _load_split(folder, of_rank, Share(0, split.num_ranks), processes, progress)
        return _make_runner(split_model, options, memory, banned_token_ids)
    except (LostRankError, ExchangeError) as error:
        processes.close()
        raise UnsupportedOptionError(str(error)) from error
    except BaseException:
        processes.close()
        raise


def build_layered(
    folder: Path,
    options: RuntimeOptions,
    devices: Sequence[DeviceMemory],
    *,
    banned_token_ids: Iterable[int] = (),
    progress: Progress | None = None,
) -> ModelRunner:
    """As `build_executor`, the layers over these devices."""
    config = load_config(folder)
    options = replace(options, dtype=_layered_dtype(options.dtype, config, *(each.device for each in devices)))
    dtype = _choose_dtype(options.dtype, devices[0].device, config)
    kv_dtype = _choose_kv_dtype(options.kv_dtype, dtype, *(each.device for each in devices))
    may_use_disk = options.offload == "disk"
    try:
        kv_tokens = options.kv_tokens or spare_kv_tokens(
            config, dtype, devices, kv_dtype=kv_dtype, max_sequences=options.max_sequences, may_use_disk=may_use_disk
        )
        places = place_layers(config, dtype, devices, kv_dtype=kv_dtype, kv_tokens=kv_tokens, may_use_disk=may_use_disk)
    except UnplacedError as error:
        raise UnsupportedOptionError(str(error)) from error
    _log.info("layers by device: %s", describe_places(places))
    of_devices = replace(options, kv_tokens=kv_tokens, device=str(devices[0].device))
    model = open_share(folder, of_devices, Share(), progress, places).load(ALONE)
    return _make_runner(model, of_devices, usable_bytes(model.device), banned_token_ids)


def _load_split(
    folder: Path, options: RuntimeOptions, share: Share, processes: RankProcesses, progress: Progress | None
) -> tuple[SplitModel, int]:
    """Also how many bytes all ranks together have for what all have equal parts of."""
    opened = open_share(folder, options, share, progress)
    processes.wait_until_ready()
    ranks = processes.while_they_live(lambda: opened.connect(processes.meeting_file))
    model = opened.load(ranks)
    of_others = map(int, processes.wait_until_ready())
    least = min(usable_bytes(model.device), *of_others)
    is_shared = model.device.type == "cpu"
    return SplitModel(model, processes, ranks), least if is_shared else least * share.num_ranks


@dataclass(frozen=True, slots=True)
class OpenedShare:
    """A rank's weights: checked, and in memory but for the layers."""

    config: NeoXConfig
    weights: NeoXWeights
    share: Share
    device: torch.device
    make_linear: Callable[..., Linear]
    make_attention: Callable[..., Attention]

    def connect(self, meeting_file: Path) -> ConnectedRanks:
        """As `connect_ranks`."""
        return connect_ranks(self.share, self.device, self.weights.embed_in.dtype, meeting_file)

    def load(self, ranks: Ranks) -> NeoX:
        """The model, all of it in memory.

        Raises:
            CheckpointError: as `build_executor`.
        """
        model = NeoX(self.config, self.weights, self.make_linear, self.make_attention, ranks)
        is_promised = self.device.type == "cpu" or self.make_linear is build_row_exact_linear
        if is_promised and self.share.is_first and not model.is_row_exact:
            _log.warning("on this device a sequence's numbers depend on its batch: %s is not row-exact", model.dtype)
        return model


def open_share(
    folder: Path,
    options: RuntimeOptions,
    share: Share,
    progress: Progress | None = None,
    places: Sequence[LayerPlace] = (),
) -> OpenedShare:
    """The share can be loaded onto the rank's own device, or its layers onto `places`.

    Raises:
        CheckpointError, UnsupportedOptionError: as `build_executor`.
    """
    config = load_config(folder)
    device = _choose_device(options.device)
    if device.type == "cuda" and share.num_ranks > 1:
        device = torch.device("cuda", share.rank)
        torch.cuda.set_device(device)
    dtype = _choose_dtype(options.dtype, device, config)
    kv_dtype = _choose_kv_dtype(options.kv_dtype, dtype, device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    make_linear = _choose_linear(options, device)
    if device.type == "cpu":
        _start_compiling(dtype, kv_dtype, quantize=options.quantize is not None)
    weights = open_weights(folder, config, dtype=dtype, device=device, share=share, places=places, progress=progress)
    return OpenedShare(config, weights, share, device, make_linear, partial(build_attention, kv_dtype=kv_dtype))


def _start_compiling(dtype: torch.dtype, kv_dtype: torch.dtype, *, quantize: bool) -> None:
    """What a CPU computes by is compiled while the weights are read."""
    attention, linear = attention_kernel(dtype, kv_dtype), linear_kernel(dtype, quantize=quantize)
    if attention and linear:
        for kernel in (linear, attention, DRAW_KERNEL):
            start_compiling(*kernel)


def _make_runner(model: NeoX | SplitModel, options: RuntimeOptions, memory: int, banned: Iterable[int]) -> ModelRunner:
    """`memory` is what the device, or the ranks' devices, have left; of a CPU, all there is."""
    kv_dtype = _choose_kv_dtype(options.kv_dtype, model.dtype, model.device)
    kv_tokens = options.kv_tokens
    if kv_tokens is None:
        given = (
            memory * _GPU_CACHE_SHARE
            if model.device.type == "cuda"
            else _cpu_cache_bytes(model.config, model.dtype, options.quantize, memory)
        )
        kv_tokens = _default_kv_tokens(model.config, kv_dtype, options.max_sequences, int(given))
    if kv_tokens < BLOCK_SIZE:
        raise UnsupportedOptionError(_why_no_block(options, model.device))
    runner = ModelRunner(
        model,
        num_blocks=kv_tokens // BLOCK_SIZE,
        banned_token_ids=banned,
        max_decoding=options.max_sequences if model.device.type == "cuda" else 0,
    )
    runner.make_buckets()
    return runner


def _why_no_block(options: RuntimeOptions, device: torch.device) -> str:
    if options.kv_tokens is not None:
        return f"--kv-tokens must be at least {BLOCK_SIZE}, not {options.kv_tokens}"
    if device.type == "cpu":
        return (
            f"the weights leave the machine no memory for {BLOCK_SIZE} positions of KV cache: give it, or its"
            " container, more, or hold the weights in fewer bits by --dtype bfloat16 or --quantize int8"
        )
    return f"the weights leave {device} no memory for {BLOCK_SIZE} positions of KV cache: {_HOW_TO_FIT}"


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


def _layered_dtype(name: str, config: NeoXConfig, *devices: torch.device) -> str:
    """The dtype asked of layers over these devices: beside a CPU, which has no kernel for fp16, GPUs compute bf16."""
    on_cpu = [device.type == "cpu" for device in devices]
    if all(on_cpu) or not any(on_cpu):
        return name
    if name == "float16":
        raise UnsupportedOptionError(
            "--dtype float16 needs every layer on a GPU: use bfloat16 with --offload, or leave it out"
        )
    if name == "auto" and config.dtype is torch.float16:
        _log.info("dtype=bfloat16: the model is in float16, which the CPU that layers may go to has no kernel for")
        return "bfloat16"
    return name


def _choose_kv_dtype(name: str, dtype: torch.dtype, *devices: torch.device) -> torch.dtype:
    """Of the cache on these devices, beside a model in `dtype`."""
    if name == "auto":
        return dtype
    on_cpu = [device.type == "cpu" for device in devices]
    if name == "int8" and not all(on_cpu):
        raise UnsupportedOptionError("--kv-dtype int8 needs --device cpu: on a GPU use fp8, or leave it out")
    if name == "fp8" and any(on_cpu):
        raise UnsupportedOptionError(
            "--kv-dtype fp8 needs every layer on a GPU: use int8 on a CPU, and leave it out with --offload"
        )
    return FP8 if name == "fp8" else INT8


def _choose_linear(options: RuntimeOptions, device: torch.device) -> Callable[..., Linear]:
    if options.quantize is None:
        return build_row_exact_linear if options.batch_invariant else build_linear
    if device.type != "cpu":
        raise UnsupportedOptionError(f"--quantize {options.quantize} needs --device cpu; leave it out on {device.type}")
    return build_quantized_linear


def _wanted_cache_bytes(config: NeoXConfig, kv_dtype: torch.dtype, options: RuntimeOptions) -> int:
    """What the weights must leave on a GPU for the KV cache that is asked for, else for one of use."""
    positions = options.kv_tokens or min(options.max_sequences, _USEFUL_SEQUENCES) * config.max_positions
    return int(positions * config.num_layers * kv_bytes(config, kv_dtype) / _GPU_CACHE_SHARE)


def _cpu_cache_bytes(config: NeoXConfig, dtype: torch.dtype, quantize: str | None, memory: int) -> float:
    """What a KV cache takes by default of a machine's memory; below zero if that does not hold the weights."""
    spare = memory - _cpu_weight_bytes(config, dtype, quantize)
    return min(memory * _CPU_CACHE_SHARE, spare * _CPU_SPARE_SHARE)


def _cpu_weight_bytes(config: NeoXConfig, dtype: torch.dtype, quantize: str | None) -> int:
    """Of all ranks together. The head is laid out for its product: apart from an embedding that it is tied to."""
    untied = replace(config, tie_word_embeddings=False)
    return weight_bytes(untied, dtype, linear_dtype=torch.int8 if quantize else dtype)


def _default_kv_tokens(config: NeoXConfig, kv_dtype: torch.dtype, max_sequences: int, memory: int) -> int:
    """Every sequence at its longest, or as many positions as that memory has room for."""
    return min(max_sequences * config.max_positions, memory // (config.num_layers * kv_bytes(config, kv_dtype)))
