"""On which device each layer of a model is computed: blocks placed by accelerate's memory-aware map.

The devices may be unequal. Each computes its own layers and holds their KV cache; rows go from one to the next. Layers
for which no device has memory stay on disk, if that is wanted: the last device reads them anew in every step.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from torch import Tensor, nn

from oasst_worker.model.attention import kv_bytes
from oasst_worker.model.config import NeoXConfig
from oasst_worker.model.weights import LayerPlace
from oasst_worker.runtime.memory import machine_bytes, usable_bytes

__all__ = [
    "DeviceMemory",
    "UnplacedError",
    "describe_places",
    "find_devices",
    "place_layers",
    "spare_kv_tokens",
    "weight_bytes",
]


# Of a GPU's free memory, of the machine's: the rest is for a step's rows and for others.
_GPU_SHARE = 0.9
_CPU_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device, and how many bytes of its memory weights and KV cache may take."""

    device: torch.device
    num_bytes: int


class UnplacedError(ValueError):
    """The devices have no memory for the model; the message says what to change."""


def weight_bytes(config: NeoXConfig, dtype: torch.dtype, *, linear_dtype: torch.dtype | None = None) -> int:
    """Of a whole model in memory; with `linear_dtype` the weights of its linear layers, head included, are in that."""
    spared = dtype.itemsize - (linear_dtype or dtype).itemsize
    linear = config.num_layers * _num_layer_weights(config) + config.vocab_size * config.hidden_size
    return _ends_bytes(config, dtype) + config.num_layers * _layer_bytes(config, dtype) - spared * linear


def find_devices(device: torch.device, memory: Mapping[str, int], offload: str) -> list[DeviceMemory]:
    """The devices that layers may be on, in the order in which rows pass them: the GPUs, or the CPU.

    With `offload` to cpu or disk the CPU comes behind the GPUs. `memory` is of each that is named what it gives;
    otherwise a GPU gives most of what is free, a CPU most of the machine's.

    Raises:
        UnplacedError: if another device is named.
    """
    found: list[DeviceMemory] = []
    if device.type == "cuda":
        for index in range(torch.cuda.device_count()):
            gpu = torch.device("cuda", index)
            found.append(DeviceMemory(gpu, int(usable_bytes(gpu) * _GPU_SHARE)))
    if device.type == "cpu" or offload != "none":
        found.append(DeviceMemory(torch.device("cpu"), int(machine_bytes() * _CPU_SHARE)))
    names = {str(each.device) for each in found}
    if unknown := memory.keys() - names:
        raise UnplacedError(
            f"--device-memory names {', '.join(sorted(unknown))}; layers can be on {', '.join(sorted(names))} here"
            " (a CPU beside GPUs takes --offload cpu)"
        )
    return [DeviceMemory(each.device, memory.get(str(each.device), each.num_bytes)) for each in found]


def spare_kv_tokens(
    config: NeoXConfig,
    dtype: torch.dtype,
    devices: Sequence[DeviceMemory],
    *,
    kv_dtype: torch.dtype,
    max_sequences: int,
    may_use_disk: bool,
) -> int:
    """Positions of KV cache: as many whole sequences as drive no layer away from where it is with room for one.

    Raises:
        UnplacedError: if there is no room even for one.
    """

    def num_near(num_sequences: int) -> int:
        """Layers in memory of the first kind of device."""
        kv_tokens = num_sequences * config.max_positions
        places = place_layers(config, dtype, devices, kv_dtype=kv_dtype, kv_tokens=kv_tokens, may_use_disk=may_use_disk)
        kind = devices[0].device.type
        return sum(place.num_layers for place in places if place.is_kept and place.device.type == kind)

    def is_too_much(num_sequences: int) -> bool:
        try:
            return num_near(num_sequences) < most_near
        except UnplacedError:
            return True

    most_near = num_near(1)
    return config.max_positions * bisect_left(range(1, max_sequences + 1), True, key=is_too_much)


def place_layers(
    config: NeoXConfig,
    dtype: torch.dtype,
    devices: Sequence[DeviceMemory],
    *,
    kv_dtype: torch.dtype,
    kv_tokens: int,
    may_use_disk: bool,
) -> tuple[LayerPlace, ...]:
    """The places of a model's layers, each with its cache of `kv_tokens` positions in `kv_dtype`.

    Rows pass the `devices` in order; embedding and head are on the first. accelerate balances the load over GPUs that
    have room for all of it, and keeps room for one more layer on the first, which a step's rows need.

    Raises:
        UnplacedError: if not all has room, and the rest may not stay on disk.
    """
    layer_bytes, cache_bytes = _layer_bytes(config, dtype), kv_bytes(config, kv_dtype) * kv_tokens
    ends_bytes = _ends_bytes(config, dtype)
    memory = [each.num_bytes for each in devices]
    reserved = 0  # On the last device, for the cache of the layers on disk.
    while True:
        left = [*memory[:-1], memory[-1] - reserved]
        indexes = _map_devices(ends_bytes, [layer_bytes + cache_bytes] * config.num_layers, devices, left)
        needed = indexes.count(None) * cache_bytes
        if not needed or (may_use_disk and needed <= reserved):
            break
        if not may_use_disk or needed > memory[-1]:
            total = ends_bytes + config.num_layers * (layer_bytes + cache_bytes)
            raise UnplacedError(
                f"the model and its cache of {kv_tokens} tokens take {_gb(total)}, for which there is no room"
                f" in {' + '.join(_gb(size) for size in memory)}: give more memory, fewer --kv-tokens, or another"
                " --offload"
            )
        reserved = needed
    last = len(devices) - 1
    runs = groupby((last if index is None else index, index is not None) for index in indexes)
    return tuple(
        LayerPlace(len([*layers]), devices[index].device, is_kept=is_kept) for (index, is_kept), layers in runs
    )


def describe_places(places: Sequence[LayerPlace]) -> str:
    """As in `0-20 cuda:0, 21-33 cpu, 34-35 disk`."""
    starts = [0, *accumulate(place.num_layers for place in places)]
    return ", ".join(
        f"{start}-{end - 1} {place.device if place.is_kept else 'disk'}"
        for place, (start, end) in zip(places, pairwise(starts), strict=True)
    )


def _map_devices(
    ends_bytes: int, layers_bytes: list[int], devices: Sequence[DeviceMemory], memory: list[int]
) -> list[int | None]:
    """The device of each layer; None is the disk."""
    model = _Skeleton(ends_bytes, layers_bytes)
    limits = {index: max(0, size) for index, size in enumerate(memory)}
    alike = {index: size for index, size in limits.items() if devices[index].device.type == devices[0].device.type}
    with _without_warnings():
        # Balanced over the GPUs if all has room there. Otherwise one after the other is filled, the CPU last.
        balanced = get_balanced_memory(model, alike, no_split_module_classes=["_Part"])
        for attempt in (balanced, limits):
            places = infer_auto_device_map(model, attempt, no_split_module_classes=["_Part"], clean_result=False)
            if "disk" not in places.values():
                break
    if places["ends"] != 0:
        raise UnplacedError(
            f"embedding and head take {_gb(ends_bytes)}, and a layer beside them {_gb(max(layers_bytes))}: the first"
            f" device's {_gb(memory[0])} are too few"
        )
    of_layers = [places[f"layer{index}"] for index in range(len(layers_bytes))]
    return [None if place == "disk" else place for place in of_layers]


class _Part(nn.Module):
    """A part of a model that is never divided: its bytes, without any memory."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        content: Tensor = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        self.content = nn.Parameter(content, requires_grad=False)


class _Skeleton(nn.Module):
    """A model as accelerate looks at it, in the order in which memory is given."""

    def __init__(self, ends_bytes: int, layers_bytes: list[int]) -> None:
        super().__init__()
        self.ends = _Part(ends_bytes)
        for index, num_bytes in enumerate(layers_bytes):
            self.add_module(f"layer{index}", _Part(num_bytes))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """accelerate warns of devices that it does not see itself: ours may be a CPU."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _ends_bytes(config: NeoXConfig, dtype: torch.dtype) -> int:
    vocabularies = 1 if config.tie_word_embeddings else 2
    return dtype.itemsize * config.hidden_size * (vocabularies * config.vocab_size + 2)


def _layer_bytes(config: NeoXConfig, dtype: torch.dtype) -> int:
    hidden = config.hidden_size
    biases = config.intermediate_size + hidden + 4 * hidden * config.attention_bias
    return dtype.itemsize * (_num_layer_weights(config) + 4 * hidden + biases)


def _num_layer_weights(config: NeoXConfig) -> int:
    """Of a layer's linear layers, without their biases."""
    return config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
